//! Who a container runs as: the image's `User`, looked up in the image's own files of users and groups.
//!
//! The files are content of the image. They are opened below its root alone ([`namespace::open_in_root`]), and read up
//! to a bound.

use std::io::Read;
use std::os::fd::BorrowedFd;
use std::path::Path;

use crate::sorting;
use crate::sys::namespace;

/// Most bytes of a file of users or groups.
const MAX_BYTES: u64 = 1 << 20;

/// A user of an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct User {
    /// The user's id.
    pub uid: u32,
    /// The group's id.
    pub gid: u32,
    /// The other groups of the user.
    pub more_gids: Vec<u32>,
    /// The home folder.
    pub home: String,
}

/// Looks up `USER[:GROUP]` in the root of an image.
///
/// # Errors
/// What is not in the files, or no number.
pub fn find(root: BorrowedFd<'_>, text: &str) -> Result<User, String> {
    let passwd = read(root, "etc/passwd")?;
    let group = read(root, "etc/group")?;
    resolve(text, &passwd, &group)
}

/// Reads a file of an image; one that is not there is empty.
fn read(root: BorrowedFd<'_>, path: &str) -> Result<String, String> {
    // Nothing that blocks: a pipe in an image stays a pipe.
    let flags = libc::O_RDONLY | libc::O_NONBLOCK | libc::O_NOCTTY;
    let file = match namespace::open_in_root(root, Path::new(path), flags) {
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENOTDIR)) => {
            return Ok(String::new());
        }
        other => other.map_err(|error| format!("cannot open /{path} of the image: {error}"))?,
    };
    let metadata = file.metadata().map_err(|error| error.to_string())?;
    if !metadata.is_file() || metadata.len() > MAX_BYTES {
        return Err(format!("/{path} of the image is no file of at most {MAX_BYTES} bytes"));
    }
    let mut bytes = Vec::new();
    file.take(MAX_BYTES)
        .read_to_end(&mut bytes)
        .map_err(|error| format!("cannot read /{path} of the image: {error}"))?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// Ids that a process can have: (uid_t) -1 stands for no change.
fn id(text: &str) -> Option<u32> {
    let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    if digits { text.parse().ok().filter(|id| *id != u32::MAX) } else { None }
}

/// Resolves `USER[:GROUP]` with the content of /etc/passwd and /etc/group.
fn resolve(text: &str, passwd: &str, group: &str) -> Result<User, String> {
    let (user, group_text) = text.split_once(':').map_or((text, None), |(user, group)| (user, Some(group)));
    let user = if user.is_empty() { "0" } else { user };
    let users =
        || passwd.lines().map(|line| line.split(':').collect::<Vec<_>>()).filter(|line| line.len() >= 6);
    let groups =
        || group.lines().map(|line| line.split(':').collect::<Vec<_>>()).filter(|line| line.len() >= 3);
    let entry = users()
        .find(|line| line[0] == user)
        .or_else(|| users().find(|line| id(user).is_some() && id(line[2]) == id(user)));
    let (uid, gid, home) = match (&entry, id(user)) {
        (Some(line), _) => {
            let bad = || format!("the line of user `{user}` in /etc/passwd of the image has no ids");
            (id(line[2]).ok_or_else(bad)?, id(line[3]).ok_or_else(bad)?, line[5].to_string())
        }
        (None, Some(uid)) => (uid, 0, String::new()),
        (None, None) => return Err(format!("the image has no user `{user}`")),
    };
    let home = if home.starts_with('/') { home } else { "/".to_string() };
    let (gid, more_gids) = match group_text.filter(|text| !text.is_empty()) {
        Some(text) => {
            let entry = groups().find(|line| line[0] == text).and_then(|line| id(line[2]));
            let gid = entry.or_else(|| id(text)).ok_or_else(|| format!("the image has no group `{text}`"))?;
            (gid, Vec::new())
        }
        None => {
            let name = entry.as_ref().map(|line| line[0]);
            let member = |line: &Vec<&str>| {
                line.get(3).is_some_and(|all| all.split(',').any(|one| !one.is_empty() && Some(one) == name))
            };
            let mut more: Vec<u32> =
                groups().filter(member).filter_map(|line| id(line[2])).filter(|more| *more != gid).collect();
            sorting::sort(&mut more);
            more.dedup();
            (gid, more)
        }
    };
    Ok(User { uid, gid, more_gids, home })
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str =
        "root:x:0:0:root:/root:/bin/sh\nwww:x:33:34:www:/var/www:/bin/false\nodd:x:7:8::rel:/x\nbroken\n";
    const GROUP: &str = "root:x:0:\nwww:x:34:\nadm:x:4:root,www\nssl:x:110:www\nmine:x:50:odd\n";

    #[test]
    fn users_and_groups_are_those_of_the_image() {
        let found = |text: &str| resolve(text, PASSWD, GROUP);
        let user = |uid, gid, more: &[u32], home: &str| {
            Ok(User { uid, gid, more_gids: more.to_vec(), home: home.to_string() })
        };
        assert_eq!(found(""), user(0, 0, &[4], "/root"));
        assert_eq!(found("www"), user(33, 34, &[4, 110], "/var/www"));
        assert_eq!(found("33"), user(33, 34, &[4, 110], "/var/www"));
        assert_eq!(found("www:ssl"), user(33, 110, &[], "/var/www"));
        assert_eq!(found("www:77"), user(33, 77, &[], "/var/www"));
        assert_eq!(found("1000"), user(1000, 0, &[], "/"));
        assert_eq!(found("1000:1000"), user(1000, 1000, &[], "/"));
        assert_eq!(found(":adm"), user(0, 4, &[], "/root"));
        assert_eq!(found("odd"), user(7, 8, &[50], "/"));
        assert_eq!(found("nobody").unwrap_err(), "the image has no user `nobody`");
        assert_eq!(found("www:nobody").unwrap_err(), "the image has no group `nobody`");
        // (uid_t) -1 is no user.
        assert!(found("4294967295").is_err());
        assert_eq!(resolve("", "", ""), user(0, 0, &[], "/"));
    }

    #[test]
    fn a_link_in_the_image_does_not_lead_to_the_files_of_the_host() {
        use std::os::fd::AsFd;
        let dir = tempfile::tempdir().unwrap();
        let outside = dir.path().join("outside");
        std::fs::write(&outside, "evil:x:1:1::/:\n").unwrap();
        let root = dir.path().join("root");
        std::fs::create_dir_all(root.join("etc")).unwrap();
        std::os::unix::fs::symlink(&outside, root.join("etc/passwd")).unwrap();
        let fd = std::fs::File::open(&root).unwrap();
        assert_eq!(find(fd.as_fd(), "evil").unwrap_err(), "the image has no user `evil`");
        std::fs::remove_file(root.join("etc/passwd")).unwrap();
        std::os::unix::fs::symlink("../../outside", root.join("etc/passwd")).unwrap();
        assert_eq!(find(fd.as_fd(), "evil").unwrap_err(), "the image has no user `evil`");
        std::fs::remove_file(root.join("etc/passwd")).unwrap();
        std::fs::create_dir(root.join("etc/passwd")).unwrap();
        assert!(find(fd.as_fd(), "evil").unwrap_err().contains("is no file"));
    }
}
