//! The program as the workspace builds it: static, so it can only say that.

use std::process::Command;

#[test]
fn a_static_build_says_what_to_install_instead_on_one_line() {
    let output = Command::new(env!("CARGO_BIN_EXE_lathe-nvml")).output().expect("it runs");
    let said = String::from_utf8(output.stderr).expect("text");
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(output.stdout.is_empty() && said.lines().count() == 1, "{said}");
    assert!(said.contains("static build") && said.contains("scripts/build-nvml"), "{said}");
}
