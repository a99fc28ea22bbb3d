use super::report::with_thousands;

#[test]
fn thousands_are_set_apart() {
    let cases = [(0, "0"), (999, "999"), (1_000, "1,000"), (30_000, "30,000"), (100_000_000, "100,000,000")];
    for (number, text) in cases {
        assert_eq!(with_thousands(number), text);
    }
}
