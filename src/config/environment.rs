//! Where the variables come from: the process, and a `.env` for what is unset there.

use std::collections::BTreeMap;

/// The variables of the process, before them those of `.env`, and what is wrong with either.
pub(super) fn environment() -> (BTreeMap<String, String>, Vec<String>) {
    const OURS: [&str; 3] = ["DOCKFLARE_", "CF_ACCESS_", "CLOUDFLARED_"];
    let (mut vars, mut errors) = (BTreeMap::new(), Vec::new());
    match dotenvy::from_path_iter(".env") {
        Ok(lines) => {
            for line in lines {
                match line {
                    Ok((name, value)) => drop(vars.insert(name, value)),
                    // The line itself may hold a secret: only its place is told.
                    Err(dotenvy::Error::LineParse(_, at)) => errors.push(format!(
                        ".env: a line cannot be read as NAME=value (stopped at character {at} of it); quote values with spaces"
                    )),
                    Err(error) => errors.push(format!(".env: cannot be read: {error}")),
                }
            }
        }
        Err(error) if error.not_found() => {}
        Err(error) => errors.push(format!(".env: cannot be read: {error}")),
    }
    for (name, value) in std::env::vars_os() {
        let name = name.to_string_lossy().into_owned();
        match value.into_string() {
            Ok(value) if value.trim().is_empty() => {}
            Ok(value) => drop(vars.insert(name, value)),
            Err(_) if OURS.iter().any(|prefix| name.starts_with(prefix)) => {
                errors.push(format!("{name}: is not valid UTF-8"));
            }
            Err(_) => {}
        }
    }
    (vars, errors)
}
