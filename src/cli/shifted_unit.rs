//! Units for the daemons of trees whose ids the kernel cannot map.

use std::path::Path;

use super::{Global, mount};
use crate::deploy::activate;
use crate::error::{AnyError, IoContext};
use crate::mount::IdShift;
use crate::mount::units::Unit;

/// Makes units for the daemons of trees with the ids of a group; none where `in_unit` is false.
pub(super) fn of(
    in_unit: bool,
    global: &Global,
) -> Result<impl Fn(&str, &Path, IdShift) -> Option<Unit> + use<>, AnyError> {
    let absolute = |path: &Path| std::path::absolute(path).on("find", path);
    let (system, config) = (absolute(&global.system)?, absolute(&global.config)?);
    Ok(move |target: &str, place: &Path, shift: IdShift| {
        let flags = activate::flags();
        let mut arguments = mount::foreground_arguments(target.as_ref(), place, &system, &config, &flags);
        // Before the source and the folder, which stand behind `--`.
        arguments.insert(1, format!("--shift-ids={shift}").into());
        let needs = vec![system.clone()];
        in_unit.then(|| Unit { source: target.into(), target: place.into(), needs, arguments })
    })
}
