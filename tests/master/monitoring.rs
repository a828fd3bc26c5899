//! Compares the alert rules and the dashboard with the metrics that exist.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

fn docs(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("docs").join(name)
}

fn text(name: &str) -> String {
    std::fs::read_to_string(docs(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
}

/// Every metric name in a text, without the suffix that Prometheus adds to a histogram.
fn metrics_in(text: &str) -> BTreeSet<String> {
    let words = text.split(|c: char| !(c.is_ascii_lowercase() || c == '_'));
    let names = words.filter(|word| word.starts_with("dockflare_agent_") && *word != "dockflare_agent_");
    names.map(|name| name.trim_end_matches("_bucket").to_owned()).collect()
}

/// The metrics in the documented table. The page's own test compares that table with the agent's output.
fn documented() -> BTreeSet<String> {
    let text = text("monitoring.md");
    let rows = text.lines().filter(|line| line.starts_with("| `dockflare_agent_"));
    rows.filter_map(|row| row.split('`').nth(1)).map(str::to_owned).collect()
}

#[test]
fn alerts_and_dashboard_ask_for_metrics_that_there_are() {
    let known = documented();
    assert!(known.len() > 20, "{known:?}");
    for name in ["monitoring/alerts.yml", "monitoring/alerts.test.yml", "monitoring/grafana.json"] {
        let asked = metrics_in(&text(name));
        let unknown: Vec<_> = asked.difference(&known).collect();
        assert!(!asked.is_empty() && unknown.is_empty(), "{name} asks for {unknown:?}");
    }
    // The dashboard must show these documented metrics.
    let shown = metrics_in(&text("monitoring/grafana.json"));
    for metric in ["tunnel_ready", "tunnel_reason", "master_contact_age_seconds", "task_up", "queue_depth"] {
        assert!(shown.contains(&format!("dockflare_agent_{metric}")), "{metric}");
    }
}

#[test]
fn the_dashboard_is_one_that_grafana_can_import() {
    let dashboard: Value = serde_json::from_str(&text("monitoring/grafana.json")).unwrap();
    assert!(dashboard["title"].is_string() && dashboard["schemaVersion"].is_u64());
    let panels = dashboard["panels"].as_array().unwrap();
    let ids: BTreeSet<_> = panels.iter().map(|panel| panel["id"].as_u64().unwrap()).collect();
    assert_eq!(ids.len(), panels.len(), "each panel has an id of its own");
    for panel in panels {
        let place = &panel["gridPos"];
        assert!(place["x"].as_u64().unwrap() + place["w"].as_u64().unwrap() <= 24, "{panel}");
        for target in panel["targets"].as_array().unwrap() {
            assert_eq!(target["datasource"]["uid"], "${datasource}", "no data source of ours: {panel}");
        }
    }
}

#[test]
fn every_alert_has_a_case_and_promtool_agrees() {
    let (rules, cases) = (text("monitoring/alerts.yml"), text("monitoring/alerts.test.yml"));
    for alert in rules.lines().filter_map(|line| line.trim().strip_prefix("- alert: ")) {
        let fires = cases.split("alertname: ").any(|case| case.starts_with(alert) && case.contains("exp_labels"));
        assert!(fires, "{alert} is never seen to fire");
    }
    for (what, name) in [("check", "monitoring/alerts.yml"), ("test", "monitoring/alerts.test.yml")] {
        match Command::new("promtool").args([what, "rules"]).arg(docs(name)).output() {
            Ok(ended) => assert!(ended.status.success(), "{}", String::from_utf8_lossy(&ended.stderr)),
            Err(error) => eprintln!("the rules were not tried: promtool cannot be run ({error})"),
        }
    }
}
