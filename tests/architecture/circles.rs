//! Files that use each other in a circle, by the paths in their code.

use crate::SourceFile;

/// Groups of files that use each other in a circle. A module and what lies below it are one thing here: neither counts
/// for the other.
pub fn circles(files: &[SourceFile]) -> Vec<Vec<&str>> {
    let tree = Tree::of(files);
    let edges: Vec<Vec<usize>> = (0..files.len()).map(|index| tree.uses(index)).collect();
    let reached: Vec<Vec<bool>> = (0..files.len())
        .map(|from| {
            let mut seen = vec![false; files.len()];
            let mut todo = edges[from].clone();
            while let Some(next) = todo.pop() {
                if !std::mem::replace(&mut seen[next], true) {
                    todo.extend(&edges[next]);
                }
            }
            seen
        })
        .collect();
    let mut done = vec![false; files.len()];
    let mut found = Vec::new();
    for (from, reaches) in reached.iter().enumerate() {
        let circle: Vec<usize> =
            (0..files.len()).filter(|&to| !done[to] && reaches[to] && reached[to][from]).collect();
        if circle.len() > 1 {
            circle.iter().for_each(|&index| done[index] = true);
            found.push(circle.iter().map(|&index| files[index].path.as_str()).collect());
        }
    }
    found
}

/// Where a file stands among the modules of its crate.
struct Place<'a> {
    /// The crate's folder.
    root: &'static str,
    /// `["mount", "plan"]`
    module: Vec<&'a str>,
}

impl<'a> Place<'a> {
    fn of(path: &'a str) -> Option<Self> {
        let root = ["src/", "benches/compare/"].into_iter().find(|root| path.starts_with(root))?;
        let mut module: Vec<&str> = path.strip_prefix(root)?.strip_suffix(".rs")?.split('/').collect();
        if matches!(module.last(), Some(&"mod")) || module == ["lib"] || module == ["main"] {
            module.pop();
        }
        Some(Self { root, module })
    }

    /// The path from the crate's root, of one that begins with `crate`, `super`, `self` or a module in this one.
    fn rooted(&self, path: &[String]) -> Vec<String> {
        let mut target: Vec<String> = match path.first().map(String::as_str) {
            Some("crate") => Vec::new(),
            _ => self.module.iter().map(|part| part.to_string()).collect(),
        };
        for part in path {
            match part.as_str() {
                "crate" | "self" => {}
                "super" => drop(target.pop()),
                name => target.push(name.into()),
            }
        }
        target
    }
}

/// What a `use` brings: the path from the crate's root, and the name that it has in the file.
struct Import {
    target: Vec<String>,
    name: String,
}

/// All files, each with its place and what it imports from its own crate.
struct Tree<'a> {
    files: &'a [SourceFile],
    places: Vec<Option<Place<'a>>>,
    imports: Vec<Vec<Import>>,
}

impl<'a> Tree<'a> {
    fn of(files: &'a [SourceFile]) -> Self {
        let places: Vec<_> = files.iter().map(|file| Place::of(&file.path)).collect();
        let imports = files.iter().zip(&places).map(|(file, own)| match own {
            Some(own) => imports(file, own, &modules_in(&places, own)),
            None => Vec::new(),
        });
        Self { files, imports: imports.collect(), places }
    }

    /// The files that a file uses, by index. A name that a module only hands on counts as where it comes from.
    fn uses(&self, index: usize) -> Vec<usize> {
        let Some(own) = &self.places[index] else { return Vec::new() };
        let file = &self.files[index];
        let mut targets: Vec<Vec<String>> = Vec::new();
        for word in ["crate", "super", "self"] {
            for at in file.words(word) {
                if file.code[at..].starts_with(&format!("{word}::")) && !file.code[..at].ends_with("::") {
                    targets.extend(paths_at(&file.code[at..]).iter().map(|path| own.rooted(path)));
                }
            }
        }
        // `b::f()`, where `use super::a::b` stands above.
        for Import { target, name } in &self.imports[index] {
            for at in file.words(name) {
                let Some(rest) = file.code[at + name.len()..].strip_prefix("::") else { continue };
                if !file.code[..at].ends_with("::") {
                    targets.extend(paths_at(rest).iter().map(|path| [target, &path[..]].concat()));
                }
            }
        }
        let mut found = Vec::new();
        for mut target in targets {
            // A name may be handed on from one module to the next.
            for _ in 0..4 {
                let Some((other, its)) = self.deepest(own.root, &target) else { break };
                let is_apart = !own.module.starts_with(&its.module) && !its.module.starts_with(&own.module);
                if is_apart && !found.contains(&other) {
                    found.push(other);
                }
                let Some(name) = target.get(its.module.len()) else { break };
                let Some(import) = self.imports[other].iter().find(|import| import.name == *name) else {
                    break;
                };
                target = [&import.target, &target[its.module.len() + 1..]].concat();
            }
        }
        found
    }

    /// The file of the deepest module that a path leads to.
    fn deepest(&self, root: &str, target: &[String]) -> Option<(usize, &Place<'a>)> {
        let places =
            self.places.iter().enumerate().filter_map(|(index, place)| Some((index, place.as_ref()?)));
        let leads = |place: &Place<'_>| {
            let on_the_way = place.module.len() <= target.len();
            let module = &place.module;
            place.root == root
                && !module.is_empty()
                && on_the_way
                && module.iter().zip(target).all(|(a, b)| a == b)
        };
        places.filter(|(_, place)| leads(place)).max_by_key(|(_, place)| place.module.len())
    }
}

/// The modules that lie directly in a module.
fn modules_in<'a>(places: &[Option<Place<'a>>], own: &Place<'_>) -> Vec<&'a str> {
    let below =
        places.iter().flatten().filter(|one| one.root == own.root && one.module.starts_with(&own.module));
    below.filter_map(|one| one.module.get(own.module.len()).copied()).collect()
}

/// What a file imports from its own crate. `modules` are those that lie in its own one.
fn imports(file: &SourceFile, own: &Place<'_>, modules: &[&str]) -> Vec<Import> {
    let mut found = Vec::new();
    for at in file.words("use") {
        let rest = file.code[at + 3..].trim_start();
        let text = rest.split(';').next().unwrap_or_default();
        let first = rest.split("::").next().unwrap_or_default();
        if !["crate", "super", "self"].contains(&first) && !modules.contains(&first) {
            continue;
        }
        // `X as Y` becomes a path for the parser: `X`, then its new name, which is marked.
        for mut path in paths_at(&text.replace(" as ", "::@")) {
            let Some(last) = path.last().cloned() else { continue };
            let name = match last.strip_prefix('@') {
                Some(new) => {
                    path.pop();
                    new.to_string()
                }
                // `a::{self}`: the name is that of `a`.
                None if last == "self" => path.iter().nth_back(1).cloned().unwrap_or_default(),
                None => last,
            };
            found.push(Import { target: own.rooted(&path), name });
        }
    }
    found
}

/// The paths that begin at this place of the code: `a::b`, and each of `a::{b, c::d}`.
fn paths_at(code: &str) -> Vec<Vec<String>> {
    fn parse(code: &[u8], at: &mut usize, before: &[String], found: &mut Vec<Vec<String>>) {
        let blank = |at: &mut usize| {
            while code.get(*at).is_some_and(u8::is_ascii_whitespace) {
                *at += 1;
            }
        };
        blank(at);
        if code.get(*at) == Some(&b'{') {
            *at += 1;
            loop {
                parse(code, at, before, found);
                // A name that is given to it, and the comma.
                while code.get(*at).is_some_and(|byte| !b",}".contains(byte)) {
                    *at += 1;
                }
                match code.get(*at) {
                    Some(b',') => *at += 1,
                    Some(_) => break *at += 1,
                    None => break,
                }
            }
            return;
        }
        let begin = *at;
        while code.get(*at).is_some_and(|byte| byte.is_ascii_alphanumeric() || b"_@".contains(byte)) {
            *at += 1;
        }
        let mut path = before.to_vec();
        path.extend((*at > begin).then(|| String::from_utf8_lossy(&code[begin..*at]).into_owned()));
        if *at > begin && code[*at..].starts_with(b"::") {
            *at += 2;
            parse(code, at, &path, found);
        } else {
            found.push(path);
        }
    }
    let (mut at, mut found) = (0, Vec::new());
    parse(code.as_bytes(), &mut at, &[], &mut found);
    found
}

#[cfg(test)]
mod the_rules_themselves {
    use super::*;

    #[test]
    fn a_circle_is_found_through_groups_and_a_parent_is_none() {
        let file = |path: &str, text: &str| SourceFile::new(path, text);
        let mut files = vec![
            file("src/a/mod.rs", "mod x;\nmod y;\nuse self::x::X;\n"),
            file("src/a/x.rs", "use super::{Parent, y::{Y, Z as W}};\n"),
            file("src/a/y.rs", "use crate::{\n    b::B,\n    error::E,\n};\n"),
            file("src/b.rs", "fn f() {\n    crate::c::g();\n}\n"),
            file("src/c/mod.rs", "// crate::a::x\n"),
        ];
        assert_eq!(circles(&files), [] as [Vec<&str>; 0]);
        files[4] = file("src/c/mod.rs", "fn f(x: crate::a::x::X) {}\n");
        assert_eq!(circles(&files), [vec!["src/a/x.rs", "src/a/y.rs", "src/b.rs", "src/c/mod.rs"]]);
        files[4] = file("src/c/mod.rs", "#[cfg(test)]\nmod tests {\n    use crate::a::x::X;\n}\n");
        let without: Vec<_> = files.iter().map(SourceFile::without_tests).collect();
        assert_eq!((circles(&files).len(), circles(&without).len()), (1, 0));
    }

    #[test]
    fn a_circle_is_found_through_names_of_modules_and_names_that_are_handed_on() {
        let file = |path: &str, text: &str| SourceFile::new(path, text);
        let circle = vec![vec!["src/a/x.rs", "src/b/y.rs"]];
        let parents =
            [file("src/a/mod.rs", "pub mod x;\npub use x::X;\n"), file("src/b/mod.rs", "pub mod y;\n")];
        for (x, y) in [
            // The module's name is imported, and its parts are used by it.
            ("use crate::b;\nfn f() {\n    b::y::g();\n}\n", "use crate::a::x::X;\n"),
            ("use crate::b::{self as other, Z};\nfn f() {\n    other::y::g();\n}\n", "use crate::a::x::X;\n"),
            ("use crate::b::{self};\nfn f() {\n    b::y::g();\n}\n", "use crate::a::x::X;\n"),
            // The name comes from the parent, which has it from a child.
            ("use crate::b::y::Y;\n", "use crate::a::X;\n"),
            ("use crate::b::y::Y;\n", "use crate::a;\nfn f(_: a::X) {}\n"),
        ] {
            let mut files = vec![file("src/a/x.rs", x), file("src/b/y.rs", y)];
            files.extend(parents.iter().map(|one| file(&one.path, &one.text)));
            assert_eq!(circles(&files), circle, "{x}{y}");
            // Without the one or the other there is none.
            for at in [0, 1] {
                let mut fewer: Vec<_> = files.iter().map(|one| file(&one.path, &one.text)).collect();
                fewer[at] = file(&files[at].path.clone(), "");
                assert_eq!(circles(&fewer), [] as [Vec<&str>; 0]);
            }
        }
    }
}
