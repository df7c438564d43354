//! Whether a server that a test has started is up.

use std::fs;

/// Whether this process itself listens on a TCP port of an IPv4 address.
///
/// A connection that is accepted does not show that: another process may have taken the port after it was chosen, and
/// the test would talk to the server of another test.
pub fn listens(pid: u32, port: u16) -> bool {
    // proc_pid_net(5): local address and port, remote ones, state; the inode is the tenth word.
    let table = fs::read_to_string(format!("/proc/{pid}/net/tcp")).unwrap_or_default();
    let ending = format!(":{port:04X}");
    let inode = table.lines().find_map(|line| {
        let words: Vec<_> = line.split_whitespace().collect();
        let [_, local, _, state, _, _, _, _, _, inode, ..] = words[..] else { return None };
        // TCP_LISTEN
        (state == "0A" && local.ends_with(&ending)).then(|| format!("socket:[{inode}]"))
    });
    let Some(inode) = inode else { return false };
    let open = fs::read_dir(format!("/proc/{pid}/fd"));
    open.into_iter()
        .flatten()
        .flatten()
        .any(|fd| fs::read_link(fd.path()).is_ok_and(|to| to.as_os_str() == &*inode))
}
