//! Each fix that the kernel's drivers once needed, and that this device could need too, has a test that names it.

use std::fs;
use std::path::Path;

/// The sources below a folder, one behind the other.
fn sources(folder: &Path, all: &mut String) {
    for entry in fs::read_dir(folder).expect("a folder of the sources") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            sources(&path, all);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            all.push_str(&fs::read_to_string(path).expect("a source file"));
        }
    }
}

#[test]
fn every_fix_of_the_kernel_is_named_by_a_test() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut all = String::new();
    sources(&root.join("src"), &mut all);
    sources(&root.join("tests"), &mut all);
    let list = fs::read_to_string(root.join("tests/kernel-fixes.txt")).unwrap();
    let titles = list.lines().filter(|line| !line.is_empty() && !line.starts_with(['#', '-']));
    let missing: Vec<_> = titles.clone().filter(|title| !all.contains(&format!("/// {title}"))).collect();
    assert!(missing.is_empty(), "no test names {missing:#?}");
    println!("{} fixes are named by tests", titles.count());
}
