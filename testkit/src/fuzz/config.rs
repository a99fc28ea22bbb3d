//! Configuration files, as TOML and as YAML.

use std::path::Path;

use udp_fanout::testing::config::Config;

/// Parses arbitrary bytes as TOML and as YAML.
pub fn run(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    for file in ["c.toml", "c.yaml"] {
        survives(text, file);
    }
}

/// Parses arbitrary text. Each line of an error names the file; an accepted configuration renders as an equal one.
pub fn survives(text: &str, file: &str) {
    match Config::parse(text, Path::new(file)) {
        Ok(config) => assert_eq!(again(&config), config),
        Err(error) => {
            let message = error.to_string();
            assert!(!message.is_empty());
            for line in message.lines() {
                assert!(line.starts_with(file), "{line:?}");
                assert!(!line.chars().any(char::is_control), "{line:?}");
            }
        }
    }
}

/// Renders a configuration and parses the result.
fn again(config: &Config) -> Config {
    let rendered = config.render();
    let read = Config::parse(&rendered, Path::new("rendered.toml"));
    let mut read = read.unwrap_or_else(|error| panic!("{error}\n{rendered}"));
    read.path.clone_from(&config.path);
    read
}
