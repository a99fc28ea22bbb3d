//! Rules that hold for the source code as a whole: layers, unique type names, the size of files.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// The top-level modules, lowest first. A module imports only modules that stand before it.
const LAYERS: [&str; 28] = [
    "version",
    "model",
    "net",
    "error_hints",
    "output",
    "admission",
    "logging",
    "host",
    "health",
    "discovery",
    "names",
    "config",
    "open_files",
    "plan",
    "datapath",
    "controller",
    "metrics",
    "control",
    "drop_log",
    "service_manager",
    "detach",
    "doctor",
    "event_loop",
    "demo",
    "cli",
    "commands",
    "testing",
    "main",
];

/// The longest file in lines.
const LONGEST: usize = 600;

/// A file of `src/` without its comments, strings and inline test modules.
struct Source {
    file: String,
    /// Its module path; empty for `lib.rs`.
    module: Vec<String>,
    code: String,
}

fn files(directory: &str, ends: &[&str]) -> Vec<PathBuf> {
    let mut directories = vec![Path::new(env!("CARGO_MANIFEST_DIR")).join(directory)];
    let mut files = Vec::new();
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                directories.push(path);
            } else if ends.iter().any(|end| path.extension().is_some_and(|extension| extension == *end)) {
                files.push(path);
            }
        }
    }
    files.sort();
    files
}

fn shown(path: &Path) -> String {
    path.strip_prefix(env!("CARGO_MANIFEST_DIR")).unwrap().display().to_string()
}

/// The files of `src/` but those of tests.
fn sources() -> Vec<Source> {
    let source = |path: PathBuf| {
        let file = shown(&path);
        let module = file.strip_prefix("src/").unwrap().strip_suffix(".rs").unwrap();
        let module: Vec<String> = module.split('/').filter(|part| *part != "lib").map(str::to_owned).collect();
        let code = without_test_modules(&without_comments(&fs::read_to_string(path).unwrap()));
        Source { file, module, code }
    };
    let all = files("src", &["rs"]).into_iter().map(source);
    let sources: Vec<Source> = all.filter(|source| !source.module.iter().any(|part| part == "tests")).collect();
    assert!(sources.len() > 100);
    sources
}

/// Replaces comments and the contents of string and character literals by nothing.
fn without_comments(text: &str) -> String {
    let mut code = String::new();
    let mut rest = text;
    while let Some(character) = rest.chars().next() {
        let skipped = match character {
            '/' if rest.starts_with("//") => rest.find('\n').unwrap_or(rest.len()),
            '"' => end_of_string(rest),
            'r' if rest.starts_with("r\"") || rest.starts_with("r#\"") => end_of_raw_string(rest),
            '\'' if rest.starts_with("'\\") => rest[2..].find('\'').map_or(1, |at| at + 3),
            '\'' if rest.chars().nth(2) == Some('\'') => 2 + rest.chars().nth(1).map_or(0, char::len_utf8),
            _ => 0,
        };
        if skipped == 0 {
            code.push(character);
            rest = &rest[character.len_utf8()..];
        } else {
            rest = &rest[skipped..];
        }
    }
    code
}

fn end_of_string(text: &str) -> usize {
    let mut escaped = true;
    for (at, character) in text.char_indices() {
        match character {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            '"' => return at + 1,
            _ => {}
        }
    }
    text.len()
}

fn end_of_raw_string(text: &str) -> usize {
    let hashes = text[1..].chars().take_while(|character| *character == '#').count();
    let end = format!("\"{}", "#".repeat(hashes));
    let start = 2 + hashes;
    text[start..].find(&end).map_or(text.len(), |at| start + at + end.len())
}

/// Cuts out every `#[cfg(test)] mod NAME { … }`.
fn without_test_modules(code: &str) -> String {
    const ATTRIBUTE: &str = "#[cfg(test)]";
    let mut kept = String::new();
    let mut rest = code;
    while let Some(at) = rest.find(ATTRIBUTE) {
        let (before, after) = rest.split_at(at);
        kept += before;
        let item = after[ATTRIBUTE.len()..].trim_start();
        let opening = item.find(['{', ';']).unwrap();
        rest = if item.starts_with("mod ") && item[opening..].starts_with('{') {
            &item[opening + closing(&item[opening..])..]
        } else {
            item
        };
    }
    kept + rest
}

/// The length of the block that the text begins with.
fn closing(text: &str) -> usize {
    let mut depth = 0;
    for (at, character) in text.char_indices() {
        match character {
            '{' => depth += 1,
            '}' => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return at + 1;
        }
    }
    text.len()
}

/// The paths that begin with this word, each group of a `use` split up, without that word.
fn paths_from(code: &str, word: &str) -> Vec<Vec<String>> {
    let mut paths = Vec::new();
    let start = format!("{word}::");
    for (at, _) in code.match_indices(&start) {
        if !code[..at].ends_with(|before: char| before.is_alphanumeric() || before == '_' || before == ':') {
            read_path(&code[at + start.len()..], &[], &mut paths);
        }
    }
    paths
}

/// Reads a path, or a group of paths, that follows `before`. Returns its length.
fn read_path(text: &str, before: &[String], paths: &mut Vec<Vec<String>>) -> usize {
    if !text.starts_with('{') {
        let length = text.find(|end: char| !end.is_alphanumeric() && end != '_').unwrap_or(text.len());
        let path = [before, &[text[..length].to_owned()]].concat();
        return match text[length..].strip_prefix("::") {
            Some(rest) => length + 2 + read_path(rest, &path, paths),
            None => {
                paths.push(path);
                length
            }
        };
    }
    let end = closing(text);
    let mut at = 1;
    while at < end {
        let Some(skip) = text[at..end - 1].find(|c: char| c.is_alphanumeric() || c == '_' || c == '{') else { break };
        at += skip;
        at += read_path(&text[at..end - 1], before, paths).max(1);
        // The rest of an item, such as `as NAME`.
        at += text[at..end - 1].find(',').unwrap_or(end - 1 - at);
    }
    end
}

/// What a file imports from its own crate, as paths from the crate's root.
fn imports(source: &Source) -> Vec<Vec<String>> {
    let root = if source.module == ["main"] { "udp_fanout" } else { "crate" };
    let mut imports = paths_from(&source.code, root);
    for relative in paths_from(&source.code, "super") {
        let ups = 1 + relative.iter().take_while(|part| *part == "super").count();
        if let Some(base) = source.module.len().checked_sub(ups) {
            imports.push([&source.module[..base], &relative[ups - 1..]].concat());
        }
    }
    imports
}

#[test]
fn a_module_imports_only_lower_modules() {
    let layer = |module: &str| LAYERS.iter().position(|known| *known == module);
    for source in sources() {
        let Some(own) = source.module.first() else { continue };
        let position = layer(own);
        assert!(position.is_some(), "{}: put `{own}` into LAYERS in {}, where it belongs", source.file, file!());
        for import in imports(&source).iter().filter(|import| import[0] != *own) {
            let (path, other) = (import.join("::"), layer(&import[0]));
            assert!(
                other.is_some(),
                "{} imports `{path}`, and `{}` is not in LAYERS in {}",
                source.file,
                import[0],
                file!()
            );
            assert!(
                other < position,
                "{} imports `{path}`, but `{}` is layer {} and `{own}` is layer {}: move what both need into a lower \
                 module (LAYERS in {})",
                source.file,
                import[0],
                other.unwrap(),
                position.unwrap(),
                file!()
            );
        }
    }
}

/// Within each module, its submodules import each other in one direction only.
#[test]
fn submodules_do_not_import_each_other_in_a_circle() {
    let sources = sources();
    let modules: BTreeSet<&[String]> = sources.iter().map(|source| source.module.as_slice()).collect();
    // For each submodule, the submodules of the same module that it imports.
    let mut edges: BTreeMap<&[String], BTreeSet<Vec<String>>> = BTreeMap::new();
    for source in &sources {
        for import in imports(source) {
            let common = source.module.iter().zip(&import).take_while(|(a, b)| a == b).count();
            let (Some(_), Some(_)) = (source.module.get(common), import.get(common)) else { continue };
            let (from, to) = (&source.module[..=common], &import[..=common]);
            if modules.contains(from) && modules.contains(to) {
                edges.entry(from).or_default().insert(to.to_vec());
            }
        }
    }
    for start in edges.keys() {
        let mut reached: BTreeSet<&[String]> = BTreeSet::new();
        let mut next: Vec<&[String]> = vec![start];
        while let Some(module) = next.pop() {
            for to in edges.get(module).into_iter().flatten() {
                assert!(
                    to != start,
                    "src/{}.rs and src/{}.rs import each other, directly or through others: {:?}",
                    start.join("/"),
                    module.join("/"),
                    reached.iter().map(|module| module.join("/")).collect::<Vec<_>>()
                );
                if reached.insert(to) {
                    next.push(to);
                }
            }
        }
    }
}

#[test]
fn type_names_are_unique_in_the_crate() {
    let mut named: BTreeMap<String, String> = BTreeMap::new();
    for source in sources() {
        for line in source.code.lines() {
            let line = line.trim_start();
            let line = line.strip_prefix("pub(crate) ").or(line.strip_prefix("pub(super) ")).unwrap_or(line);
            let line = line.strip_prefix("pub ").unwrap_or(line);
            let words: Vec<&str> = line.split(|c: char| !c.is_alphanumeric() && c != '_').collect();
            if let ["struct" | "enum" | "trait" | "union", name, ..] = words[..] {
                let before = named.insert(name.to_owned(), source.file.clone());
                assert!(before.is_none(), "`{name}` is a type in {} and in {}", before.unwrap(), source.file);
            }
        }
    }
    assert!(named.len() > 200);
}

#[test]
fn files_are_short() {
    for path in [files("src", &["rs"]), files("bpf", &["c", "h"])].concat() {
        let lines = fs::read_to_string(&path).unwrap().lines().count();
        assert!(lines <= LONGEST, "{} has {lines} lines, {LONGEST} at most: split it by concept", shown(&path));
    }
}

/// The public surface of the crate: `main` for the program, `testing` for tests.
#[test]
fn the_library_has_two_public_items() {
    let text = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("src/lib.rs")).unwrap();
    let code = without_comments(&text);
    let public: Vec<&str> = code.lines().filter(|line| line.starts_with("pub ")).collect();
    assert_eq!(public, ["pub mod testing;", "pub use commands::main;"], "re-export it in src/testing.rs for tests");
}

#[test]
fn all_of_the_testing_facade_is_used() {
    let testing = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/testing.rs");
    let items = paths_from(&without_comments(&fs::read_to_string(testing).unwrap()), "crate");
    assert!(items.len() > 100);
    let users: Vec<PathBuf> = ["tests", "benches", "testkit"].iter().flat_map(|room| files(room, &["rs"])).collect();
    let users: String = users.iter().map(|path| without_comments(&fs::read_to_string(path).unwrap())).collect();
    let words: BTreeSet<&str> = users.split(|c: char| !c.is_alphanumeric() && c != '_').collect();
    for item in items {
        let name = item.last().unwrap().as_str();
        assert!(words.contains(name), "src/testing.rs re-exports {}, which no test uses", item.join("::"));
    }
}

/// A module's file has its default path. Only the benchmarks share a directory of modules.
#[test]
fn modules_are_where_their_names_say() {
    for directory in ["src", "tests", "lab", "testkit", "fuzz/fuzz_targets"] {
        for path in files(directory, &["rs"]) {
            let code = without_comments(&fs::read_to_string(&path).unwrap());
            assert!(!code.contains("#[path"), "{} names a module's file", shown(&path));
        }
    }
}

#[test]
fn imports_are_found() {
    let code = without_test_modules(&without_comments(
        "use crate::a::{self, b::{C, d}, e as f}; // crate::x\nlet s = \"crate::y\"; crate::g::h();\n\
         #[cfg(test)]\nmod tests { use crate::z; }\nuse super::super::i::J;",
    ));
    let source = Source { file: String::new(), module: ["top", "middle", "low"].map(str::to_owned).into(), code };
    let found: Vec<String> = imports(&source).iter().map(|path| path.join("::")).collect();
    assert_eq!(found, ["a::self", "a::b::C", "a::b::d", "a::e", "g::h", "top::i::J"]);
}
