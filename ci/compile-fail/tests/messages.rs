//! Each program beside its exact message. `TRYBUILD=overwrite` writes them anew; read the difference before it is kept.

#[test]
fn messages() {
    trybuild::TestCases::new().compile_fail("tests/messages/*.rs");
}
