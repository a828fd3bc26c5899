//! Log settings of the vault: `LOG_LEVEL`, `LOG_FORMAT` and `TZ`, as for the agent.

use std::collections::BTreeMap;

use dockflare_host::logging::{Asked, LogConfig, read};

/// Reads the log settings.
///
/// # Errors
/// A line for each wrong setting.
pub fn log(env: &BTreeMap<String, String>) -> Result<LogConfig, Vec<String>> {
    let given = |name: &str| env.get(name).map(|value| value.trim()).filter(|value| !value.is_empty());
    let asked = Asked { level: given("LOG_LEVEL"), format: given("LOG_FORMAT"), zone: given("TZ") };
    let (config, problems) = read(asked, "dockflare_vault");
    if problems.is_empty() { Ok(config) } else { Err(problems) }
}
