//! The series' bugs do not compile.

#[test]
fn the_bugs_of_the_series_do_not_compile() {
    trybuild::TestCases::new().compile_fail("tests/misuse/*.rs");
}
