//! Registries: what mosfs fetches from them and puts there, and what it makes of those that lie, break
//! or stall. The real ones are Debian's `docker-registry` and `skopeo` as another client; faults come
//! from a registry of our own on a thread (`server.rs`).

#[path = "../common/publish.rs"]
#[allow(dead_code, reason = "other tests use the rest")]
mod publish;

mod attacks;
mod debian;
mod faults;
mod kills;
mod login;
mod place;
mod real;
mod server;
