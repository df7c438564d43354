//! Registries: what mosfs fetches from them and puts there, and what it makes of those that lie, break
//! or stall. The real ones are Debian's `docker-registry` and `skopeo` as another client; faults come
//! from a registry of our own on a thread (`server.rs`).
//!
//! What a registry, or somebody between it and us, may try, and where it is shown how it ends. `lazy::` is
//! `tests/lazy/`, `unit` stands for the tests beside the code in `src/transport/registry/`.
//!
//! | what is tried | tests |
//! | --- | --- |
//! | a redirect, an upload's `Location` or a `Link` to another server, to see the token | `attacks::a_redirect_carries_the_blob_and_not_the_token`, `limits::an_upload_elsewhere_carries_the_bytes_and_not_the_token`, `attacks::pages_of_a_list_end_and_stay_on_their_server` |
//! | https that leads to http: a redirect, an upload, a token service | `login::https_never_leads_to_plain_http`, `login::a_token_service_elsewhere_is_asked_without_the_password` |
//! | a token service elsewhere, on this machine or its link | `login::a_token_service_elsewhere_is_asked_without_the_password`, unit `auth::who_is_asked_for_a_token_and_who_sees_the_password` |
//! | redirects without end, to other schemes, with a password | `attacks::redirects_end` |
//! | `urls` in a descriptor | `attacks::urls_in_a_descriptor_are_never_followed` |
//! | manifests, tags, referrers, tokens, errors and headers without end | `attacks::documents_and_headers_without_end_are_refused_while_they_are_read`, `limits::answers_of_token_services_and_lists_of_referrers_end` |
//! | a blob that is longer, shorter, another one, compressed | `attacks::blobs_of_other_bytes_or_length_are_refused`, `attacks::compressed_answers_are_refused` |
//! | cuts and stalls at each tenth, without end | `faults::a_blob_that_is_cut_at_each_tenth_goes_on_there`, `limits::a_stall_at_each_tenth_of_a_blob_ends_and_the_rest_is_fetched`, `faults::a_server_that_cuts_for_ever_is_given_up_and_the_next_run_goes_on` |
//! | silence, one byte at a time, headers that drip | `faults::silence_and_drip_are_cut_and_the_rest_is_fetched`, `limits::headers_that_drip_are_given_up` |
//! | 401, 403, 404, 416, 429, 5xx, `Retry-After` of years | `faults::statuses_end_as_they_should`, `limits::the_wait_that_a_server_asks_for_is_bounded`, unit `client::waits_are_bounded_whatever_a_server_asks_for` |
//! | ranges that are ignored, others, or several | `faults::a_server_without_ranges_still_delivers`, `faults::a_range_must_be_the_one_that_was_asked_for`, `limits::a_range_in_several_parts_is_refused` |
//! | a token or a link that ends in the middle | `faults::a_token_that_expires_in_the_middle_is_renewed`, `attacks::a_redirect_carries_the_blob_and_not_the_token` |
//! | a tag that moves, other bytes under a digest, a false `Docker-Content-Digest` | `faults::a_tag_that_moves_is_resolved_once`, `attacks::the_digest_that_a_server_claims_does_not_count` |
//! | an older system under a newer tag | `attacks::an_older_system_under_a_newer_tag_is_a_rollback` |
//! | a certificate of another name, expired, of another CA | `login::a_certificate_must_be_of_this_host_in_time_and_of_a_known_ca` |
//! | names that leave their place, control characters | `attacks::names_that_are_none_are_refused_before_anything_is_asked`, unit `text::words_of_a_server_are_short_and_tame` |
//! | a layer that does not fit, indexes of indexes | `attacks::a_layer_that_does_not_fit_is_refused_before_it_is_fetched`, `attacks::indexes_lead_to_one_manifest_of_this_platform_or_end` |
//! | a password or token in messages, progress, logs, `/run`, on disk | `login::passwords_and_tokens_are_found_and_never_shown`, `lazy::away::a_mount_keeps_no_password_and_no_token` |
//! | a credential helper that hangs, prints much, is a path | `login::credential_helpers_are_asked_and_bounded`, unit `credentials::a_helper_is_a_name_and_not_a_path` |
//! | one wrong byte anywhere in a layer that is mounted while it is fetched | `lazy::formats`, `lazy::faults::wherever_a_byte_is_wrong_a_reader_gets_the_right_ones_or_an_error` |
//! | a server that goes away and comes back under a mount | `lazy::away::a_registry_that_is_killed_and_comes_back_disturbs_no_reader_of_what_is_here`, `lazy::faults::while_the_network_stalls_what_is_here_is_read_and_the_rest_fails_in_time_and_recovers` |
//! | kills in the middle, at each commit point and at any moment | `kills`, `lazy::update::kills_at_every_point_leave_the_old_system_or_the_new_one` |
//! | many devices at once | `fleet` |

#[path = "../common/publish.rs"]
#[allow(dead_code, reason = "other tests use the rest")]
mod publish;

mod attacks;
mod debian;
mod faults;
mod ferro;
mod fleet;
mod kills;
mod limits;
mod login;
mod nginx;
mod place;
mod real;
mod server;
mod traffic;
