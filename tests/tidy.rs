//! Keeps what is written true: the code map, the links, the openings of files, where `unsafe` is.
//!
//! Documentation rots where no machine looks at it. Everything here is checked from the files as they lie in the
//! repository, so it needs neither git nor a build. `docs/CONFIGURATION.md` is checked by the node's own tests.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// Where Rust source lies.
const SOURCE: [&str; 8] = ["src", "engine", "net", "cluster", "bin", "bench", "examples", "tests"];
/// Never looked into.
const NOT_OURS: [&str; 6] = ["target", "node_modules", ".git", ".venv", "corpus", "artifacts"];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// All files below a folder, as paths from the root of the repository.
fn files(below: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![below.to_path_buf()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display())) {
            let path = entry.expect("a folder can be listed").path();
            let name = path.file_name().expect("an entry has a name").to_string_lossy().into_owned();
            if NOT_OURS.contains(&name.as_str()) {
                continue;
            }
            if path.is_dir() {
                folders.push(path);
            } else {
                found.push(path.strip_prefix(root()).expect("below the root").to_path_buf());
            }
        }
    }
    found.sort();
    found
}

fn rust_files() -> Vec<PathBuf> {
    let all = SOURCE.iter().flat_map(|folder| files(&root().join(folder)));
    all.filter(|path| path.extension().is_some_and(|extension| extension == "rs")).collect()
}

/// The part of a document below a heading, up to the next heading of the same kind.
fn section(text: &str, heading: &str) -> String {
    let start = text.find(heading).unwrap_or_else(|| panic!("no {heading:?}")) + heading.len();
    let rest = &text[start..];
    rest[..rest.find("\n## ").unwrap_or(rest.len())].to_owned()
}

/// Everything between backticks.
fn quoted(text: &str) -> impl Iterator<Item = &str> {
    text.split('`').skip(1).step_by(2)
}

fn complain(what: &str, found: &[String]) {
    assert!(found.is_empty(), "{what}:\n  {}", found.join("\n  "));
}

#[test]
fn the_code_map_names_every_source_file_and_nothing_else() {
    let map = section(&read(&root().join("docs/ARCHITECTURE.md")), "## Code map");
    let named: BTreeSet<&str> = quoted(&map).filter(|word| word.contains('/')).collect();

    let gone: Vec<String> =
        named.iter().filter(|name| !root().join(name).exists()).map(|name| (*name).to_owned()).collect();
    complain("docs/ARCHITECTURE.md maps what does not exist", &gone);

    // A file is on the map by its own name or by that of a folder that ends in `/` and is a module (`x/` or `tests/support/`),
    // not a whole crate.
    let missing: Vec<String> = rust_files()
        .iter()
        .map(|path| path.to_string_lossy().into_owned())
        .filter(|path| {
            let by_folder = named.iter().any(|name| {
                name.ends_with('/') && path.starts_with(name) && !root().join(name).join("../Cargo.toml").exists()
            });
            !named.contains(path.as_str()) && !by_folder
        })
        .collect();
    complain("docs/ARCHITECTURE.md does not map", &missing);
}

#[test]
fn every_source_file_says_first_what_it_is() {
    let silent: Vec<String> = rust_files()
        .iter()
        .filter(|path| !read(&root().join(path)).starts_with("//! "))
        .map(|path| path.display().to_string())
        .collect();
    complain("these files do not open with `//! ` and a sentence", &silent);
}

#[test]
fn nothing_is_left_for_later_in_secret() {
    // Put together here, so that this file does not find itself.
    let forbidden: Vec<String> = ["todo", "unimplemented", "dbg"].iter().map(|word| format!("{word}!(")).collect();
    let marks: Vec<String> =
        ["TO", "FIX", "XX"].iter().zip(["DO", "ME", "X"]).map(|(a, b)| format!("{a}{b}")).collect();
    let mut found = Vec::new();
    for path in rust_files() {
        for (number, line) in read(&root().join(&path)).lines().enumerate() {
            let marked = line.split(|c: char| !c.is_alphanumeric()).any(|word| marks.iter().any(|mark| mark == word));
            if marked || forbidden.iter().any(|word| line.contains(word.as_str())) {
                found.push(format!("{}:{}: {}", path.display(), number + 1, line.trim()));
            }
        }
    }
    complain("a limit is written as a fact or as a decision page, not as a mark in the code", &found);
}

#[test]
fn unsafe_code_is_where_the_architecture_says() {
    let said = section(&read(&root().join("docs/ARCHITECTURE.md")), "## Where unsafe code is");
    let said: BTreeSet<String> = quoted(&said).filter(|word| word.contains('/')).map(str::to_owned).collect();
    let word = format!("un{}", "safe");
    let openings = [format!("{word} {{"), format!("{word} impl"), format!("{word} fn"), format!("{word} extern")];
    let found: BTreeSet<String> = rust_files()
        .iter()
        .filter(|path| {
            let text = read(&root().join(path));
            let mut code = text.lines().filter(|line| !line.trim_start().starts_with("//"));
            code.any(|line| openings.iter().any(|opening| line.contains(opening.as_str())))
        })
        .map(|path| path.to_string_lossy().into_owned())
        .collect();
    assert_eq!(found, said, "left: files that have it; right: files that docs/ARCHITECTURE.md names");
}

#[test]
fn links_in_documents_lead_somewhere() {
    let mut broken = Vec::new();
    for document in files(root()).iter().filter(|path| path.extension().is_some_and(|extension| extension == "md")) {
        let text = read(&root().join(document));
        let folder = root().join(document).parent().expect("a file lies in a folder").to_path_buf();
        let inline = text.split("](").skip(1).filter_map(|rest| rest.split(')').next());
        let referenced = text.lines().filter(|line| line.starts_with('[')).filter_map(|line| line.split("]: ").nth(1));
        for link in inline.chain(referenced) {
            let path = link.split('#').next().expect("a split has a first part");
            if !path.is_empty() && !path.contains("://") && !folder.join(path).exists() {
                broken.push(format!("{}: {link}", document.display()));
            }
        }
    }
    complain("links that lead nowhere", &broken);
}

#[test]
fn every_decision_is_listed() {
    let list = read(&root().join("docs/decisions/README.md"));
    let missing: Vec<String> = files(&root().join("docs/decisions"))
        .iter()
        .map(|path| path.file_name().expect("a file has a name").to_string_lossy().into_owned())
        .filter(|name| name != "README.md" && !list.contains(&format!("({name})")))
        .collect();
    complain("docs/decisions/README.md does not list", &missing);
}

#[test]
fn scripts_can_be_run_and_stop_at_errors() {
    use std::os::unix::fs::PermissionsExt;

    let mut wrong = Vec::new();
    let library = Path::new("scripts/lib");
    for path in files(&root().join("scripts")).iter().filter(|path| !path.starts_with(library)) {
        let full = root().join(path);
        if fs::metadata(&full).expect("the file is there").permissions().mode() & 0o111 == 0 {
            wrong.push(format!("{} is not executable", path.display()));
        }
        if !read(&full).contains("set -euo pipefail") {
            wrong.push(format!("{} does not say `set -euo pipefail`", path.display()));
        }
    }
    complain("scripts", &wrong);
}

#[test]
fn every_page_has_a_title_and_a_text() {
    let pages = files(&root().join("docs")).into_iter().filter(|path| path.extension().is_some_and(|end| end == "md"));
    let empty: Vec<String> = pages
        .filter(|path| {
            let text = read(&root().join(path));
            !text.starts_with("# ") || text.lines().filter(|line| !line.trim().is_empty()).count() < 3
        })
        .map(|path| path.to_string_lossy().into_owned())
        .collect();
    complain("pages without a title or a text", &empty);
}
