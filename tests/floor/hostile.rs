//! A TPM that answers nonsense, late, or not at all: an error in bounded time, never a panic.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use mosfs::internals::error::{Class, Classified};
use mosfs::internals::sys::tpm::TpmError;

use crate::proxy::{Do, Proxy, command_code, response};
use crate::*;

/// Short enough for a test, long enough for a simulator.
const SHORT: Duration = Duration::from_millis(400);

fn floor_within(tcti: Tcti, budget: Duration) -> TpmFloor {
    TpmFloor::new(policy(), tcti, budget)
}

/// Numbers that look random and are the same each time (xorshift64*).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn bytes(&mut self, count: usize) -> Vec<u8> {
        (0..count).map(|_| self.next() as u8).collect()
    }
}

#[test]
fn a_tpm_that_never_answers_is_busy_after_the_time_that_it_was_given() {
    let proxy = Proxy::start(None, |_, _| Do::Hang);
    let error = floor_within(proxy.tcti(), SHORT).read().unwrap_err();
    assert!(matches!(error, FloorError::Tpm(TpmError::Timeout { .. })), "{error}");
    assert_eq!(error.class(), Class::Tpm);
}

#[test]
fn a_simulator_that_serves_somebody_else_is_busy() {
    let swtpm = provisioned(200);
    let mut first = floor(&swtpm);
    assert_eq!(first.read().unwrap(), 200);
    // The first one keeps its connection, and swtpm serves one at a time without a word.
    let error = floor_within(swtpm.tcti(), SHORT).read().unwrap_err();
    assert!(matches!(error, FloorError::Tpm(TpmError::Timeout { .. })), "{error}");
    drop(first);
    assert_eq!(floor(&swtpm).read().unwrap(), 200);
}

#[test]
fn a_tpm_that_is_busy_for_a_while_is_asked_again() {
    for code in [0x922, 0x920, 0x908, 0x90a] {
        let swtpm = provisioned(200);
        let mut refusals = 2;
        let proxy = Proxy::start(Some(swtpm.port()), move |_, command| {
            // TPM2_NV_Write.
            if command_code(command) == 0x137 && refusals > 0 {
                refusals -= 1;
                return Do::Code(code);
            }
            Do::Forward
        });
        let mut floor = floor_at(proxy.tcti());
        floor.raise(300, &signed(300)).unwrap_or_else(|error| panic!("{code:#x}: {error}"));
        drop(floor);
        drop(proxy);
        assert_eq!(second_opinion(&swtpm), 300);
        assert_nothing_left(&swtpm);
    }
}

#[test]
fn a_tpm_that_stays_busy_is_given_up() {
    for code in [0x922, 0x920, 0x908] {
        let asked = Arc::new(AtomicUsize::new(0));
        let count = asked.clone();
        let proxy = Proxy::start(None, move |_, _| {
            count.fetch_add(1, Ordering::SeqCst);
            Do::Code(code)
        });
        let error = floor_within(proxy.tcti(), BUDGET).read().unwrap_err();
        assert!(
            matches!(error, FloorError::Tpm(TpmError::Busy { code: c, .. }) if c == code),
            "{code:#x}: {error}"
        );
        assert_eq!(error.class(), Class::Tpm);
        let asked = asked.load(Ordering::SeqCst);
        assert!((2..=100).contains(&asked), "asked {asked} times");
    }
}

#[test]
fn answers_that_no_tpm_gives_are_errors() {
    let header = |tag: u16, size: u32, code: u32| {
        [&tag.to_be_bytes()[..], &size.to_be_bytes(), &code.to_be_bytes()].concat()
    };
    let mut random = Random(42);
    let mut answers = vec![
        vec![],
        vec![0x80],
        header(0x8001, 10, 0),
        header(0x8001, 4, 0),
        header(0x8001, 11, 0),
        header(0x8001, u32::MAX, 0),
        header(0x00c4, 10, 0),
        // TSS2_BASE_RC_TRY_AGAIN, with and without a layer: tpm2-tss must not spin on it.
        header(0x8001, 10, 9),
        header(0x8001, 10, 0x000a_0009),
        header(0x8001, 10, 0x0007_0009),
        [header(0x8001, 4096, 0), vec![0xff; 4086]].concat(),
        [header(0x8002, 4096, 0), vec![0; 4086]].concat(),
        response(0x101),
        response(0x100),
    ];
    for size in [1_usize, 9, 10, 11, 40, 100, 4096] {
        answers.push(random.bytes(size));
        // A good header before rubbish.
        answers.push([header(0x8001, 10 + size.min(4086) as u32, 0), random.bytes(size.min(4086))].concat());
    }
    for answer in answers {
        let shown = answer.clone();
        let proxy = Proxy::start(None, move |_, _| Do::Bytes(answer.clone()));
        for error in [
            floor_within(proxy.tcti(), SHORT).read().unwrap_err(),
            floor_within(proxy.tcti(), SHORT).raise(300, &signed(300)).unwrap_err(),
        ] {
            let end = shown.len().min(20);
            assert!(matches!(error, FloorError::Tpm(_)), "{:x?}: {error}", &shown[..end]);
            assert_eq!(error.class(), Class::Tpm);
        }
    }
}

#[test]
fn a_tpm_that_goes_away_is_an_error_at_each_command() {
    let swtpm = provisioned(200);
    for at in 0..12 {
        let proxy = Proxy::start(
            Some(swtpm.port()),
            move |number, _| {
                if number == at { Do::Close } else { Do::Forward }
            },
        );
        let result = floor_within(proxy.tcti(), BUDGET).raise(201, &signed(201));
        drop(proxy);
        if at == 0 {
            assert!(matches!(result, Err(FloorError::Tpm(TpmError::Io { .. }))), "{result:?}");
        }
        let stands_at = floor(&swtpm).read().unwrap();
        assert!(stands_at == 200 || stands_at == 201);
        assert!(result.is_err() || stands_at == 201);
        // What the broken connection left in the simulator, which has no resource manager.
        swtpm.tool_ok("tpm2_flushcontext", &["-l"]);
        swtpm.tool_ok("tpm2_flushcontext", &["-t"]);
    }
}

#[test]
fn a_refusal_of_any_command_leaves_nothing_in_the_tpm() {
    let swtpm = provisioned(200);
    let mut commands = 0;
    for (version, at) in (201..).zip(0..) {
        let refused = Arc::new(AtomicUsize::new(0));
        let seen = refused.clone();
        let proxy = Proxy::start(Some(swtpm.port()), move |number, command| {
            // TPM2_FlushContext is what must not be in the way.
            if number == at && command_code(command) != 0x165 {
                seen.store(1, Ordering::SeqCst);
                // TPM_RC_FAILURE would end a TPM's life; TPM_RC_MEMORY does not.
                Do::Code(0x904)
            } else {
                Do::Forward
            }
        });
        let result = floor_within(proxy.tcti(), BUDGET).raise(version, &signed(version));
        drop(proxy);
        assert_nothing_left(&swtpm);
        if refused.load(Ordering::SeqCst) == 1 {
            let error = result.expect_err("a refused command");
            assert!(matches!(&error, FloorError::Tpm(TpmError::Refused { code: 0x904, .. })), "{error}");
        } else {
            result.expect("a raise without a refusal");
        }
        commands = at;
        if at > 20 {
            break;
        }
    }
    assert!(commands > 10, "a raise has more commands than {commands}");
    assert!(second_opinion(&swtpm) > 200);
}

#[test]
fn the_response_codes_of_the_table_are_the_errors_of_the_table() {
    // (command, response code, what a raise makes of it)
    type Is = fn(&FloorError) -> bool;
    let table: [(u32, u32, Is); 8] = [
        (0x169, 0x18b, |error| {
            matches!(error, FloorError::InTpm { problem: TpmFloorProblem::NotProvisioned, .. })
        }),
        (0x14e, 0x14a, |error| {
            matches!(error, FloorError::InTpm { problem: TpmFloorProblem::ProvisionIncomplete, .. })
        }),
        (0x149, 0x126, |error| matches!(error, FloorError::RaiseRefused { version: 300, floor: 200 })),
        (0x177, 0x2db, |error| matches!(error, FloorError::BadFloorSignature { version: 300, .. })),
        (0x137, 0x99d, |error| {
            matches!(
                error,
                FloorError::InTpm { problem: TpmFloorProblem::PolicyMismatch { code: 0x99d, .. }, .. }
            )
        }),
        (0x16a, 0x1c4, |error| {
            matches!(
                error,
                FloorError::InTpm { problem: TpmFloorProblem::PolicyMismatch { code: 0x1c4, .. }, .. }
            )
        }),
        (0x137, 0x922, |error| {
            matches!(error, FloorError::Tpm(TpmError::Timeout { .. } | TpmError::Busy { .. }))
        }),
        (0x137, 0x921, |error| matches!(error, FloorError::Tpm(TpmError::Refused { code: 0x921, .. }))),
    ];
    let swtpm = provisioned(200);
    for (command, code, is) in table {
        let proxy = Proxy::start(Some(swtpm.port()), move |_, sent| {
            if command_code(sent) == command { Do::Code(code) } else { Do::Forward }
        });
        let error = floor_at(proxy.tcti()).raise(300, &signed(300)).unwrap_err();
        assert!(is(&error), "{command:#x} {code:#x}: {error:?}");
        assert_eq!(error.class(), Class::Tpm);
        drop(proxy);
        assert_nothing_left(&swtpm);
    }
    let empty = Swtpm::start();
    let table: [(u32, u32, Is); 5] = [
        (0x12a, 0x14b, |error| matches!(error, FloorError::InTpm { problem: TpmFloorProblem::NvFull, .. })),
        (0x12a, 0x14c, |error| matches!(error, FloorError::AlreadyProvisioned { .. })),
        (0x12a, 0x9a2, |error| {
            matches!(error, FloorError::InTpm { problem: TpmFloorProblem::OwnerAuthNeeded, .. })
        }),
        (0x160, 0x5db, |error| matches!(error, FloorError::BadProvisionSignature)),
        (0x137, 0x99d, |error| {
            matches!(error, FloorError::InTpm { problem: TpmFloorProblem::PolicyMismatch { .. }, .. })
        }),
    ];
    for (command, code, is) in table {
        let proxy = Proxy::start(Some(empty.port()), move |_, sent| {
            if command_code(sent) == command { Do::Code(code) } else { Do::Forward }
        });
        let provision = || {
            let begun = floor_at(proxy.tcti()).provision(provision_key().public(), &authorization())?;
            let signature = sign_provision(&provision_key(), &begun.message(), Path::new(""))?;
            begun.finish(&signature)
        };
        let error = provision().unwrap_err();
        assert!(is(&error), "{command:#x} {code:#x}: {error:?}");
        assert_eq!(error.class(), Class::Tpm);
        drop(proxy);
        assert_nothing_left(&empty);
        assert_eq!(empty.handles("handles-nv-index"), [""; 0], "{command:#x} {code:#x}");
    }
}

#[test]
fn a_raise_that_somebody_else_did_meanwhile_is_success() {
    let swtpm = provisioned(200);
    let mut reads = 0;
    let proxy = Proxy::start(Some(swtpm.port()), move |_, command| {
        // The first NV_Read says 100, as if the raise to 200 had come after it.
        if command_code(command) == 0x14e {
            reads += 1;
            if reads == 1 {
                return Do::Mangle(Box::new(|answer| {
                    // header, parameterSize, TPM2B size, the data
                    answer[16..24].copy_from_slice(&100_u64.to_be_bytes());
                }));
            }
        }
        Do::Forward
    });
    floor_at(proxy.tcti()).raise(150, &signed(150)).expect("0x126, and at or above 150 when read again");
    drop(proxy);
    assert_eq!(second_opinion(&swtpm), 200);
}

#[test]
fn a_raise_that_reads_back_lower_is_an_error() {
    let swtpm = provisioned(200);
    let mut reads = 0;
    let proxy = Proxy::start(Some(swtpm.port()), move |_, command| {
        if command_code(command) == 0x14e {
            reads += 1;
            if reads == 2 {
                return Do::Mangle(Box::new(|answer| {
                    answer[16..24].copy_from_slice(&299_u64.to_be_bytes());
                }));
            }
        }
        Do::Forward
    });
    let error = floor_at(proxy.tcti()).raise(300, &signed(300)).unwrap_err();
    assert!(
        matches!(
            error,
            FloorError::InTpm { problem: TpmFloorProblem::NotRaised { version: 300, floor: 299, .. }, .. }
        ),
        "{error}"
    );
}

#[test]
fn changed_answers_never_panic_and_never_hang() {
    let swtpm = provisioned(200);
    let started = Instant::now();
    for seed in 1..=150_u64 {
        let mut random = Random(seed);
        let proxy = Proxy::start(Some(swtpm.port()), move |_, command| {
            if command_code(command) == 0x165 || random.next().is_multiple_of(3) {
                return Do::Forward;
            }
            let (at, mask, cut) = (random.next() as usize, random.next() as u8, random.next());
            Do::Mangle(Box::new(move |answer| {
                let at = at % answer.len();
                answer[at] ^= mask;
                if cut % 5 == 0 {
                    answer.truncate(at);
                }
            }))
        });
        let mut floor = floor_within(proxy.tcti(), Duration::from_millis(60));
        let version = 1000 + seed;
        if let Err(error) = floor.raise(version, &signed(version)) {
            assert_eq!(error.class(), Class::Tpm, "{error}");
            assert!(!error.to_string().is_empty());
        }
        drop(floor);
        drop(proxy);
        swtpm.tool("tpm2_flushcontext", &["-l"]);
        swtpm.tool("tpm2_flushcontext", &["-t"]);
    }
    eprintln!("150 raises with changed answers in {:?}", started.elapsed());
    assert!(floor(&swtpm).read().is_ok());
}

#[test]
fn a_file_that_is_no_tpm_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    std::fs::write(&file, [0; 64]).unwrap();
    for path in [file.as_path(), Path::new("/dev/null"), Path::new("/dev/zero"), dir.path()] {
        let error = floor_within(Tcti::Device(path.into()), SHORT).read().unwrap_err();
        assert_eq!(error.class(), Class::Tpm, "{}: {error}", path.display());
        assert!(matches!(error, FloorError::Tpm(_)), "{}: {error}", path.display());
    }
}
