//! The public names of the crate: what `src/lib.rs` exports, with fields, variants and methods, must be what
//! `tests/face.txt` lists. So the crate's face changes only on purpose.
//!
//! Where a change is meant, `MOSFS_WRITE_FACE=1 cargo test --test face` writes the list anew.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use syn::{Attribute, Fields, ImplItem, Item, ItemImpl, TraitItem, Type, UseTree, Visibility};

/// Two screens of the index that `cargo doc` makes.
const MAX_NAMES: usize = 100;

/// The items of each module: `["store", "put"]`, without its tests.
type Modules = BTreeMap<Vec<String>, Vec<Item>>;

fn package() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// Reads all modules of the library.
fn modules() -> Modules {
    fn walk(folder: &Path, module: &[String], found: &mut Modules) {
        for entry in fs::read_dir(folder).expect("a readable folder") {
            let path = entry.expect("a readable entry").path();
            let stem = path.file_stem().and_then(|stem| stem.to_str()).expect("a name in UTF-8").to_string();
            let own =
                if stem == "mod" || stem == "lib" { module.to_vec() } else { [module, &[stem]].concat() };
            if path.is_dir() {
                walk(&path, &own, found);
            } else if path.extension().is_some_and(|end| end == "rs") {
                let text = fs::read_to_string(&path).expect("UTF-8 source");
                let file =
                    syn::parse_file(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
                found.insert(own, file.items);
            }
        }
    }
    let mut found = Modules::new();
    walk(&package().join("src"), &[], &mut found);
    assert!(found.len() > 100, "only {} modules found", found.len());
    found
}

/// The names that a tree of `use` brings in, each with the path that it stands for.
fn leaves(tree: &UseTree, before: &[String], found: &mut Vec<(String, Vec<String>)>) {
    let with = |name: &syn::Ident| [before, &[name.to_string()]].concat();
    match tree {
        UseTree::Path(path) => leaves(&path.tree, &with(&path.ident), found),
        UseTree::Name(name) => found.push((name.ident.to_string(), with(&name.ident))),
        UseTree::Rename(name) => found.push((name.rename.to_string(), with(&name.ident))),
        UseTree::Group(group) => group.items.iter().for_each(|one| leaves(one, before, found)),
        UseTree::Glob(_) => panic!("a glob in a public `use`: {before:?}"),
    }
}

fn uses(items: &[Item]) -> Vec<(String, Vec<String>)> {
    let mut found = Vec::new();
    for item in items {
        if let Item::Use(one) = item
            && matches!(one.vis, Visibility::Public(_))
        {
            leaves(&one.tree, &[], &mut found);
        }
    }
    found
}

fn name_of(item: &Item) -> Option<String> {
    let ident = match item {
        Item::Struct(item) => &item.ident,
        Item::Enum(item) => &item.ident,
        Item::Trait(item) => &item.ident,
        Item::Type(item) => &item.ident,
        Item::Const(item) => &item.ident,
        Item::Fn(item) => &item.sig.ident,
        _ => return None,
    };
    Some(ident.to_string())
}

/// The module that defines what a path below `module` leads to, and the item. `None` for another crate's.
fn definition<'a>(
    modules: &'a Modules,
    module: &[String],
    path: &[String],
) -> Option<(Vec<String>, &'a Item)> {
    let (name, folders) = path.split_last()?;
    let mut place = module.to_vec();
    for folder in folders {
        match folder.as_str() {
            "crate" => place.clear(),
            "self" => {}
            "super" => drop(place.pop()),
            child => place.push(child.to_string()),
        }
    }
    let items = modules.get(&place)?;
    if let Some(item) = items.iter().find(|item| name_of(item).as_ref() == Some(name)) {
        return Some((place, item));
    }
    if let Some((_, path)) = uses(items).into_iter().find(|(own, _)| own == name) {
        return definition(modules, &place, &path);
    }
    // Made by a macro: `words! { … }`.
    let made = |item: &&Item| matches!(item, Item::Macro(one) if one.ident.is_none() && one.mac.tokens.to_string().contains(&format!(" {name} ")));
    items.iter().find(made).map(|item| (place, item))
}

fn is_public(visibility: &Visibility) -> bool {
    matches!(visibility, Visibility::Public(_))
}

fn is_for_tests(attributes: &[Attribute]) -> bool {
    attributes.iter().any(|one| one.path().is_ident("cfg") && quiet(&one.meta).contains("test"))
}

fn quiet(meta: &syn::Meta) -> String {
    match meta {
        syn::Meta::List(list) => list.tokens.to_string(),
        _ => String::new(),
    }
}

fn fields(fields: &Fields) -> Vec<String> {
    let name = |(at, field): (usize, &syn::Field)| match &field.ident {
        Some(name) => name.to_string(),
        None => at.to_string(),
    };
    fields.iter().enumerate().filter(|(_, field)| is_public(&field.vis)).map(name).collect()
}

/// Whether an inherent `impl` is of the type with that name, or of the trait object.
fn is_of(block: &ItemImpl, name: &str) -> bool {
    let last = |path: &syn::Path| path.segments.last().is_some_and(|last| last.ident == name);
    block.trait_.is_none()
        && match &*block.self_ty {
            Type::Path(path) => last(&path.path),
            Type::TraitObject(object) => object.bounds.iter().any(|bound| match bound {
                syn::TypeParamBound::Trait(bound) => last(&bound.path),
                _ => false,
            }),
            _ => false,
        }
}

/// The public methods and constants of a type that `home` defines; they may stand anywhere in its room.
fn members(modules: &Modules, home: &[String], name: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for (place, items) in modules.iter().filter(|(place, _)| place.first() == home.first()) {
        // Another type of the same name.
        if place != home && items.iter().any(|item| name_of(item).as_deref() == Some(name)) {
            continue;
        }
        for item in items {
            let Item::Impl(block) = item else { continue };
            if !is_of(block, name) || is_for_tests(&block.attrs) {
                continue;
            }
            for one in &block.items {
                match one {
                    ImplItem::Fn(one) if is_public(&one.vis) && !is_for_tests(&one.attrs) => {
                        found.insert(format!("{}()", one.sig.ident));
                    }
                    ImplItem::Const(one) if is_public(&one.vis) => {
                        found.insert(one.ident.to_string());
                    }
                    _ => {}
                }
            }
        }
    }
    found
}

/// One line of the list.
fn line(modules: &Modules, name: &str, path: &[String]) -> String {
    let Some((home, item)) = definition(modules, &[], path) else {
        assert_eq!(path.len(), 2, "{name}: nothing defines {path:?}");
        return format!("{name}: of the crate {}", path[0]);
    };
    let own = path.last().expect("a name");
    let (kind, mut parts) = match item {
        Item::Struct(item) => ("struct", fields(&item.fields)),
        Item::Enum(item) => ("enum", item.variants.iter().map(|one| one.ident.to_string()).collect()),
        Item::Trait(item) => {
            let name = |one: &TraitItem| match one {
                TraitItem::Fn(one) => Some(format!("{}()", one.sig.ident)),
                _ => None,
            };
            ("trait", item.items.iter().filter_map(name).collect())
        }
        Item::Fn(_) => ("fn", Vec::new()),
        Item::Type(_) => ("type", Vec::new()),
        Item::Const(_) => ("const", Vec::new()),
        _ => ("enum of words", Vec::new()),
    };
    parts.extend(members(modules, &home, own));
    let mut line = format!("{kind} {name}");
    for (at, part) in parts.iter().enumerate() {
        let _ = write!(line, "{}{part}", if at == 0 { ": " } else { ", " });
    }
    line
}

#[test]
fn the_public_names_are_those_of_the_list() {
    let modules = modules();
    let library = &modules[&Vec::new()];
    let mut text = String::new();
    let mut put = |module: &str, names: Vec<(String, Vec<String>)>| {
        let _ = writeln!(text, "[{module}]");
        let lines: BTreeSet<_> = names.iter().map(|(name, path)| line(&modules, name, path)).collect();
        lines.iter().for_each(|line| text.extend([line, "\n"]));
        names.len()
    };
    let mut names = put("mosfs", uses(library));
    for item in library {
        let Item::Mod(module) = item else { continue };
        let hidden = module.attrs.iter().any(|one| quiet(&one.meta) == "hidden");
        if is_public(&module.vis) && !hidden {
            let (_, items) = module.content.as_ref().expect("a module in the file");
            put(&format!("mosfs::{}", module.ident), uses(items));
            names += 1;
        }
        assert!(!is_public(&module.vis) || module.content.is_some(), "{} is public", module.ident);
    }
    assert!(names <= MAX_NAMES, "{names} public names, more than the {MAX_NAMES} that two screens have");

    let list = package().join("tests/face.txt");
    if std::env::var_os("MOSFS_WRITE_FACE").is_some() {
        fs::write(&list, &text).unwrap();
    }
    let expected = fs::read_to_string(&list).unwrap();
    let (found, listed): (BTreeSet<_>, BTreeSet<_>) = (text.lines().collect(), expected.lines().collect());
    let mut report = String::new();
    found.difference(&listed).for_each(|line| writeln!(report, "is not listed: {line}").unwrap());
    listed.difference(&found).for_each(|line| writeln!(report, "is listed, and gone: {line}").unwrap());
    assert!(
        report.is_empty(),
        "\n{report}If this is meant: MOSFS_WRITE_FACE=1 cargo test --test face, and say so in CHANGELOG.md"
    );
    assert_eq!(text, expected);
}
