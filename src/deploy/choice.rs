//! Chooses the deployment to boot: pending while it has tries, else current, else previous.
//!
//! Rules (docs/design.md, floor at boot, try first): each candidate is verified again; a version below the
//! floor is never started; a pending deployment's try is spent, and synced, before it is used; every refusal
//! is recorded with its reason. A floor that cannot be read, or that was tampered with, stops the boot: no
//! candidate could be trusted then.
//!
//! A boot depends on as little as possible. A state file that cannot be read is rebuilt ([`super::recover`]).
//! On a disk that cannot be written no try can be counted: a pending deployment is skipped, and the current
//! one boots. `start` checks whether the images that a boot needs are complete: incomplete images of other
//! targets must not prevent a boot.

use std::time::{Duration, Instant};

use super::error::DeployError;
use super::recover::{self, Recovered};
use super::state::{Damage, DeploymentId, LastBoot, Refusal, State, clip};
use super::{System, deployment as on_disk, kernel};
use crate::digest::Digest;
use crate::error::{AnyError, Class};
use crate::floor::{Floor, FloorError};
use crate::sys::failpoint;
use crate::trust::{Anchor, Dates, Verified};

/// The role in which a deployment is tried.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// It was installed by an update and has not yet proved healthy.
    Pending,
    /// It proved healthy last.
    Current,
    /// It was current before.
    Previous,
}

/// A deployment that was started.
#[derive(Debug)]
pub struct Booted<T> {
    /// The deployment.
    pub deployment: DeploymentId,
    /// Its role.
    #[cfg_attr(not(feature = "internals"), expect(dead_code, reason = "what tests ask a choice for"))]
    pub role: Role,
    /// Those that were refused before it, in order.
    pub refused: Vec<Refusal>,
    /// How long its signature, certificate and manifest took to verify.
    pub verifying: Duration,
    /// Why the state file was not used, where it could not be read.
    pub damage: Option<Damage>,
    /// The result of starting it.
    pub started: T,
}

/// Chooses a deployment and starts it with `start`; tries the next if that fails.
///
/// `start` mounts the deployment; its failure counts as a refusal. `kernel` is the id of the running kernel.
///
/// # Errors
/// [`DeployError::Floor`] if the floor cannot be trusted; [`DeployError::NoneLeft`] if every deployment was
/// refused, with the class of the most serious reason: rollback before verification before anything else.
pub fn choose<T>(
    system: &System,
    anchor: &Anchor,
    floor: &mut dyn Floor,
    kernel: Option<Digest>,
    mut start: impl FnMut(&Verified, Role) -> Result<T, AnyError>,
) -> Result<Booted<T>, DeployError> {
    let _lock = system.lock_as_it_is(|| {})?;
    let lowest = floor.read()?;
    let mut gravest = Class::Failure;
    let (mut state, mut refused) = match read_state(system) {
        Ok(state) => (state, Vec::new()),
        Err(damage) => {
            let Recovered { state, refused } = recover::for_boot(system, anchor, lowest, damage)?;
            gravest = refused.iter().fold(gravest, |so_far, (_, class)| graver(so_far, *class));
            (state, refused.into_iter().map(|(refusal, _)| refusal).collect())
        }
    };
    let damage = state.damage.clone();
    if let Some(id) = state.fetching() {
        // Rule (docs/design.md, whole before it boots): no try is spent on what is not all here.
        let why = DeployError::StillFetching { id };
        log::warn!("{why}");
        refused.push(Refusal::new(id, why.to_string()));
    }
    for (id, role) in candidates(&state) {
        let limits = Limits { lowest, kernel };
        let attempt = try_one(system, anchor, &limits, &mut state, id, role, &mut start);
        match attempt {
            Ok((started, verifying)) => {
                record(system, &mut state, Some(id), &refused);
                return Ok(Booted { deployment: id, role, refused, verifying, damage, started });
            }
            Err(error) => {
                gravest = graver(gravest, error.class());
                log::error!("deployment {id} is not booted: {error}");
                refused.push(Refusal::new(id, clip(&error.to_string())));
            }
        }
    }
    record(system, &mut state, None, &refused);
    Err(DeployError::NoneLeft { refused, class: gravest })
}

/// Returns the state on disk. If there are deployments, a missing file is damage too: an attacker who removes
/// it must not be able to stop the boot.
fn read_state(system: &System) -> Result<State, Damage> {
    match State::read(&system.state_path())? {
        Some(state) => Ok(state),
        None if on_disk::list(system).is_ok_and(|(whole, _)| !whole.is_empty()) => Err(Damage::Missing),
        None => Ok(State::default()),
    }
}

/// The deployments that may be tried, in order.
fn candidates(state: &State) -> Vec<(DeploymentId, Role)> {
    let pending = state.pending.as_ref().filter(|pending| pending.tries_left > 0 && !pending.fetching);
    let all = [
        pending.map(|pending| (pending.deployment, Role::Pending)),
        state.current.map(|id| (id, Role::Current)),
        state.previous.map(|id| (id, Role::Previous)),
    ];
    let mut list: Vec<(DeploymentId, Role)> = Vec::new();
    let found = state.found.iter().map(|id| (*id, Role::Previous));
    for (id, role) in all.into_iter().flatten().chain(found) {
        if !list.iter().any(|(seen, _)| *seen == id) {
            list.push((id, role));
        }
    }
    list
}

/// What a deployment must satisfy beside its signature.
struct Limits {
    /// The floor.
    lowest: u64,
    /// The id of the running kernel, if it has one.
    kernel: Option<Digest>,
}

fn try_one<T>(
    system: &System,
    anchor: &Anchor,
    limits: &Limits,
    state: &mut State,
    id: DeploymentId,
    role: Role,
    start: &mut impl FnMut(&Verified, Role) -> Result<T, AnyError>,
) -> Result<(T, Duration), AnyError> {
    if role == Role::Pending {
        // Rule (docs/design.md, kernel of the system): a pending deployment whose kernel does not run is passed over
        // without spending a try. The boot loader has its own count for that kernel.
        kernel::says_other(system, &id, limits.kernel)?;
        // Rule: a try is spent and synced before it is used. If it cannot be written, the deployment is not
        // tried: a system that always fails must not be tried forever.
        let mut spent = state.clone();
        if let Some(pending) = &mut spent.pending {
            pending.tries_left -= 1;
        }
        spent.save(&system.state_path())?;
        *state = spent;
        failpoint::hit("boot.try.spent");
    }
    // Rule: no clock is trusted in early boot: dates are logged, not enforced.
    let clock = Instant::now();
    let verified = on_disk::verify(system, &id, anchor, Dates::LogOnly)?;
    let verifying = clock.elapsed();
    // Rule: boot: `version >= floor`.
    if id.version < limits.lowest {
        return Err(FloorError::Rollback { version: id.version, floor: limits.lowest }.into());
    }
    kernel::check(kernel::required(system, verified.manifest())?, limits.kernel)?;
    Ok((start(&verified, role)?, verifying))
}

/// Returns the more serious class: rollback before verification before anything else.
pub fn graver(one: Class, other: Class) -> Class {
    let rank = |class| match class {
        Class::Rollback => 4,
        Class::Verification => 3,
        Class::Tpm => 2,
        Class::Input => 1,
        Class::Failure => 0,
    };
    if rank(other) > rank(one) { other } else { one }
}

/// Records the outcome of the choice. A disk that cannot be written does not stop a boot.
fn record(system: &System, state: &mut State, chosen: Option<DeploymentId>, refused: &[Refusal]) {
    // A file of another format is left to the mosfs that knows it; and nothing that the next command could
    // not rebuild is written over an unreadable one.
    if state.damage.is_some() && state.pending.is_none() {
        return;
    }
    let later = state.last_boot.as_ref().map(|last| last.later.clone()).unwrap_or_default();
    let outcome = Some(LastBoot { chosen, refused: refused.to_vec(), later });
    if state.last_boot == outcome {
        return;
    }
    state.last_boot = outcome;
    if let Err(error) = state.save(&system.state_path()) {
        log::warn!("the outcome of this boot is not recorded: {error}");
    }
}
