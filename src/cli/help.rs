//! What `--help` and the man pages show: commands in groups, the options of a command before those of all commands,
//! and examples.
//!
//! One row of [`PAGES`] for each command: its group, which of the options of all commands it uses (the others are accepted
//! and not shown), and its examples, which `tests/help.rs` runs.

use std::fmt::Write;

use clap::{Command, CommandFactory};

use super::Cli;

/// What a command is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Group {
    /// For those who build systems.
    Publisher,
    /// For a device that runs one.
    Device,
    /// For any machine.
    Host,
    /// For scripts and packages.
    Plumbing,
}

impl Group {
    /// All groups in the order of the help, with their titles.
    const ALL: [(Group, &str); 4] = [
        (Group::Publisher, "Publisher"),
        (Group::Device, "Device"),
        (Group::Host, "Any host"),
        (Group::Plumbing, "Plumbing"),
    ];
}

/// The help of one command.
struct Page {
    /// The command's words, such as `floor show`.
    command: &'static str,
    group: Group,
    /// The options of all commands that it uses, besides `--verbose`.
    globals: &'static [&'static str],
    /// Command lines.
    examples: &'static [&'static str],
}

const fn page(
    command: &'static str,
    group: Group,
    globals: &'static [&'static str],
    examples: &'static [&'static str],
) -> Page {
    Page { command, group, globals, examples }
}

/// In the order of the help.
const PAGES: &[Page] = &[
    page("keys", Group::Publisher, &[], &[]),
    page(
        "keys generate",
        Group::Publisher,
        &["json"],
        &["mosfs keys generate keys --product de6c82c5-2e01-4c92-949b-a6545d30fc06"],
    ),
    page("manifest", Group::Publisher, &[], &[]),
    page("manifest check", Group::Publisher, &["json"], &["mosfs manifest check import.yaml"]),
    page("manifest canonical", Group::Publisher, &[], &["mosfs manifest canonical manifest.json"]),
    page("manifest show", Group::Publisher, &["json"], &["mosfs manifest show oci:store > manifest.json"]),
    page(
        "manifest sign",
        Group::Publisher,
        &[],
        &["mosfs manifest sign manifest.json --key keys/signer.key"],
    ),
    page(
        "manifest verify",
        Group::Publisher,
        &["json"],
        &[
            "mosfs manifest verify manifest.json --sig manifest.json.sig --cert keys/signer.pem --ca keys/ca.pem",
        ],
    ),
    page(
        "build",
        Group::Publisher,
        &["json", "progress_fd"],
        &[
            "mosfs build import.yaml --store store --key keys/signer.key --cert keys/signer.pem --floor-key keys/floor.key",
        ],
    ),
    page(
        "iso",
        Group::Publisher,
        &["config", "json", "progress_fd"],
        &[
            "mosfs iso oci:store --output install.iso",
            "mosfs iso --verify install.iso --ca keys/ca.pem --product de6c82c5-2e01-4c92-949b-a6545d30fc06",
        ],
    ),
    page(
        "push",
        Group::Publisher,
        &["json", "progress_fd"],
        &["mosfs push --store store docker://127.0.0.1:5000/product"],
    ),
    page(
        "pull",
        Group::Publisher,
        &["json", "progress_fd"],
        &["mosfs pull docker://127.0.0.1:5000/product --store copy"],
    ),
    page(
        "install",
        Group::Device,
        &["system", "config", "json", "progress_fd"],
        &["mosfs install oci:store --ca keys/ca.pem --product de6c82c5-2e01-4c92-949b-a6545d30fc06"],
    ),
    page(
        "update",
        Group::Device,
        &["system", "config", "json", "progress_fd"],
        &["mosfs update oci:store --check", "mosfs update oci:store"],
    ),
    page(
        "setup",
        Group::Device,
        &["config", "json", "progress_fd"],
        &[
            "mosfs setup oci:store --disk /dev/sdb --ca keys/ca.pem --product de6c82c5-2e01-4c92-949b-a6545d30fc06 --dry-run",
            "mosfs setup oci:store --disk /dev/sdb --provision-key keys/provision.key",
        ],
    ),
    page("status", Group::Device, &["system", "config", "json"], &["mosfs status", "mosfs status --json"]),
    page(
        "activate",
        Group::Device,
        &["system", "config", "json"],
        &["mosfs activate --dry-run", "mosfs activate"],
    ),
    page("ps", Group::Device, &["system", "config", "json"], &["mosfs ps", "mosfs ps --json"]),
    page(
        "exec",
        Group::Device,
        &["system", "config"],
        &["mosfs exec web -- ls /", "mosfs exec --user app web -- id"],
    ),
    page("logs", Group::Device, &["system", "config"], &["mosfs logs web", "mosfs logs --lines 20 web"]),
    page("commit", Group::Device, &["system", "config", "json"], &["mosfs commit"]),
    page(
        "repair",
        Group::Device,
        &["system", "config", "json", "progress_fd"],
        &["mosfs repair", "mosfs repair oci:store"],
    ),
    page("gc", Group::Device, &["system", "json"], &["mosfs gc --dry-run", "mosfs gc --store store"]),
    page("floor", Group::Device, &[], &[]),
    page(
        "floor provision",
        Group::Device,
        &["system", "config", "json"],
        &["mosfs floor provision --provision-key keys/provision.key --floor-pub keys/floor.pub \
            --product de6c82c5-2e01-4c92-949b-a6545d30fc06"],
    ),
    page("floor show", Group::Device, &["system", "config", "json"], &["mosfs floor show"]),
    page(
        "floor sign",
        Group::Device,
        &[],
        &[
            "mosfs floor sign --version 200 --key keys/floor.key --product de6c82c5-2e01-4c92-949b-a6545d30fc06 \
            --output floor.sig",
        ],
    ),
    page(
        "floor authorize",
        Group::Device,
        &[],
        &["mosfs floor authorize --provision-pub keys/provision.pub --key keys/floor.key \
            --product de6c82c5-2e01-4c92-949b-a6545d30fc06"],
    ),
    page(
        "floor sign-provision",
        Group::Device,
        &[],
        &["mosfs floor sign-provision --nonce nonce --key keys/provision.key --output signature"],
    ),
    page(
        "mount",
        Group::Host,
        &["system", "config"],
        &["mosfs mount hostfs mnt", "mosfs mount oci:images:tools mnt"],
    ),
    page("trace", Group::Host, &["system", "config"], &["mosfs trace hostfs --output list -- cat etc/motd"]),
    page("umount", Group::Host, &[], &["mosfs umount mnt"]),
    page(
        "verify",
        Group::Host,
        &["system", "config", "json", "progress_fd"],
        &["mosfs verify", "mosfs verify oci:store"],
    ),
    page("store", Group::Host, &[], &[]),
    page(
        "store stats",
        Group::Host,
        &["system", "json"],
        &["mosfs store stats", "mosfs store stats --store store"],
    ),
    page(
        "run-target",
        Group::Plumbing,
        &["system", "config"],
        &["mosfs run-target --print web", "mosfs run-target web"],
    ),
    page(
        "boot",
        Group::Plumbing,
        &["system", "config", "json"],
        &["mosfs boot --sysroot sysroot --cmdline cmdline"],
    ),
];

/// The command line with all that its help shows.
pub(super) fn command() -> Command {
    dressed(Cli::command())
}

/// The same without the `help` commands: for man pages, of which each command has one.
pub(super) fn without_help_commands() -> Command {
    fn bare(command: Command) -> Command {
        let below: Vec<String> = command.get_subcommands().map(|one| one.get_name().to_string()).collect();
        below
            .iter()
            .fold(command.disable_help_subcommand(true), |command, name| command.mut_subcommand(name, bare))
    }
    dressed(bare(Cli::command()))
}

fn dressed(mut command: Command) -> Command {
    // Options of all commands reach the subcommands here.
    command.build();
    let overview = overview(&command);
    let template = format!(
        "{{about-with-newline}}\n{{usage-heading}} {{usage}}\n\n{overview}\n{{options}}\n\n\
         `mosfs help COMMAND` shows the options of a command and examples."
    );
    command = command.help_template(template);
    for page in PAGES {
        let words: Vec<&str> = page.command.split(' ').collect();
        command = dress(command, &words, page);
    }
    command
}

/// The groups of commands, one line a command.
fn overview(command: &Command) -> String {
    let mut text = String::new();
    for (group, title) in Group::ALL {
        let _ = writeln!(text, "{title}:");
        for page in PAGES.iter().filter(|page| page.group == group && !page.command.contains(' ')) {
            let about = command.find_subcommand(page.command).and_then(Command::get_about);
            let about = about.map(ToString::to_string).unwrap_or_default();
            let _ = writeln!(text, "  {:<10} {}", page.command, about.trim_end_matches('.'));
        }
        text.push('\n');
    }
    text.pop();
    text
}

fn dress(command: Command, words: &[&str], page: &Page) -> Command {
    if let [word, rest @ ..] = words {
        return command.mut_subcommand(word, |command| dress(command, rest, page));
    }
    let command = command.mut_args(|arg| {
        let is_global = arg.is_global_set() && arg.get_id() != "verbose";
        let hidden = is_global && !page.globals.contains(&arg.get_id().as_str());
        if hidden { arg.hide(true) } else { arg }
    });
    match page.examples {
        [] => command,
        [one] => command.after_help(format!("Example:\n  {one}")),
        several => command.after_help(format!("Examples:\n  {}", several.join("\n  "))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The words of all commands that a user can call, hidden ones aside.
    fn commands(command: &Command, before: &str, all: &mut Vec<String>) {
        for one in command.get_subcommands().filter(|one| !one.is_hide_set() && one.get_name() != "help") {
            let words = format!("{before}{}", one.get_name());
            commands(one, &format!("{words} "), all);
            all.push(words);
        }
    }

    #[test]
    fn every_command_has_a_page_and_an_example() {
        let mut all = Vec::new();
        commands(&Cli::command(), "", &mut all);
        all.sort();
        let mut pages: Vec<&str> = PAGES.iter().map(|page| page.command).collect();
        pages.sort_unstable();
        assert_eq!(all, pages);
        for page in PAGES {
            let is_group = PAGES.iter().any(|other| other.command.starts_with(&format!("{} ", page.command)));
            assert_eq!(page.examples.is_empty(), is_group, "{}", page.command);
            assert!(page.examples.iter().all(|line| line.starts_with(&format!("mosfs {}", page.command))));
        }
    }

    #[test]
    fn the_dressed_command_line_still_parses() {
        command().debug_assert();
        let matches =
            command().try_get_matches_from(["mosfs", "--json", "umount", "--system", "/x", "mnt"]).unwrap();
        let (name, umount) = matches.subcommand().unwrap();
        assert_eq!(name, "umount");
        // Accepted, though the help does not show it.
        assert_eq!(umount.get_one::<std::path::PathBuf>("system").unwrap().to_str(), Some("/x"));
        assert!(umount.get_flag("json"));
    }
}
