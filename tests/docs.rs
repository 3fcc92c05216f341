//! What the pages of `docs/` promise to have.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::Path;

use verbs_sys::ibv_wc_status;

fn page(name: &str) -> String {
    std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(name)).unwrap()
}

#[test]
fn every_completion_status_has_its_row() {
    let page = page("docs/TROUBLESHOOTING.md");
    let names: Vec<_> = (0..256).filter_map(|code| ibv_wc_status(code).name()).collect();
    assert!(names.len() >= 24, "{names:?}");
    for name in names {
        assert!(page.contains(&format!("`{name}`")), "{name} is missing in docs/TROUBLESHOOTING.md");
    }
}

#[test]
fn every_example_is_in_the_readme() {
    let readme = page("README.md");
    for entry in std::fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("examples")).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_stem().unwrap().to_str().unwrap();
        assert!(readme.contains(&format!("`{name}`")), "the example {name} is missing in README.md");
    }
}

#[test]
fn pages_and_programs_that_pages_name_exist() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    for name in [
        "README.md",
        "CONTRIBUTING.md",
        "docs/GUIDE.md",
        "docs/DEPLOY.md",
        "docs/TROUBLESHOOTING.md",
        "docs/PERFORMANCE.md",
    ] {
        for word in page(name).split(|c: char| c.is_whitespace() || "`()".contains(c)) {
            let is_path =
                ["docs/", "ci/", "examples/", "benches/"].iter().any(|folder| word.starts_with(folder));
            let word = word.trim_end_matches(['.', ',', ';', ':']);
            assert!(!is_path || root.join(word).exists(), "{name} names {word}, which does not exist");
        }
    }
}
