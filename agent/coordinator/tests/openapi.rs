//! The API's description is a golden file: a change of the API shows as a diff.
//!
//! `LATHE_UPDATE_GOLDEN=1 cargo test -p lathe-coordinator --test openapi` writes it anew.

use lathe_coordinator::api::openapi::ApiDoc;
use utoipa::OpenApi;

#[test]
fn the_description_is_the_one_that_was_reviewed() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/openapi.json");
    let now = ApiDoc::openapi().to_pretty_json().expect("it serialises") + "\n";
    if std::env::var_os("LATHE_UPDATE_GOLDEN").is_some() {
        std::fs::write(path, &now).expect("written");
    }
    let golden = std::fs::read_to_string(path).expect("tests/openapi.json");
    assert!(now == golden, "the API changed: review it, then run with LATHE_UPDATE_GOLDEN=1");
}
