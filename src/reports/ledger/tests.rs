//! Tests the ledger against a master with any limits. The master forgets, gets replaced by one with other limits, and
//! the agent restarts.

use proptest::prelude::*;

use super::*;

/// A master: its limits in bytes for a container and a report, and what it believes.
#[derive(Debug, Clone, Default)]
struct Double {
    of_a_container: usize,
    of_a_report: usize,
    believes: BTreeSet<String>,
}

/// A host, the ledger of its agent, and the ledger's file.
struct Host {
    containers: Containers,
    ledger: Ledger,
    file: Option<BTreeMap<String, String>>,
    now: Instant,
}

#[derive(Debug, Clone)]
enum Step {
    Start(usize),
    Stop(usize),
    /// The agent is killed; containers may end before it is started again.
    Restart(Vec<usize>),
    NewSession,
    Forget,
    Bounds(usize, usize),
    Wait,
    /// Exchanges this many messages.
    Talk(usize),
}

fn container(number: usize) -> Container {
    let id = format!("c{number}");
    // Some are large.
    let label = "x".repeat(if number.is_multiple_of(4) { 2000 + 100 * number } else { number });
    let labels = [("dockflare.enable".to_owned(), "true".to_owned()), ("dockflare.service".to_owned(), label)];
    Container { name: id.clone(), id, labels: labels.into(), status: "running".into(), image: String::new() }
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0..12_usize).prop_map(Step::Start),
        3 => (0..12_usize).prop_map(Step::Stop),
        2 => proptest::collection::vec(0..12_usize, 0..3).prop_map(Step::Restart),
        1 => Just(Step::NewSession),
        1 => Just(Step::Forget),
        1 => (prop_oneof![Just(500_usize), Just(2500), Just(1 << 20)], prop_oneof![Just(600_usize), Just(3000), Just(1 << 20)])
            .prop_map(|(one, all)| Step::Bounds(one, all)),
        1 => Just(Step::Wait),
        4 => (1..12_usize).prop_map(Step::Talk),
    ]
}

impl Host {
    /// Sends one message, if there is one. `due` says whether a report is due.
    fn talk(&mut self, master: &mut Double, due: &mut bool) -> bool {
        self.ledger.forget_gone(&self.containers);
        let said = if *due && self.ledger.can_report(&self.containers, self.now) {
            *due = false;
            let reported: Vec<_> = self.containers.values().filter(|one| !self.ledger.is_left_out(&one.id)).collect();
            let size = self.ledger.size(&self.containers);
            let fits = size <= master.of_a_report && reported.iter().all(|one| weight(one).0 <= master.of_a_container);
            if fits {
                let names: BTreeMap<_, _> = reported.iter().map(|one| (one.id.clone(), one.name.clone())).collect();
                for id in &master.believes {
                    assert!(
                        names.contains_key(id) || !self.containers.contains_key(id),
                        "{id} runs and loses its rule"
                    );
                }
                master.believes = names.keys().cloned().collect();
                self.ledger.report_taken(names);
            } else {
                self.ledger.report_refused(size, Why::TooLarge);
                *due = true;
            }
            true
        } else {
            match self.ledger.next(&self.containers, self.now) {
                Some(One::Start(container)) => self.start(master, &container, due),
                Some(One::Stop { id, .. }) => {
                    master.believes.remove(&id);
                    self.ledger.stop_taken(&id);
                }
                None => return self.ledger.settle(&self.containers, self.now).is_some(),
            }
            true
        };
        self.keep();
        said
    }

    fn start(&mut self, master: &mut Double, container: &Container, due: &mut bool) {
        if weight(container).0 <= master.of_a_container.min(master.of_a_report) {
            master.believes.insert(container.id.clone());
            self.ledger.start_taken(container);
        } else {
            self.ledger.start_refused(container);
            *due = true;
        }
    }

    fn keep(&mut self) {
        self.file = self.ledger.to_keep().cloned();
    }
}

fn play(steps: Vec<Step>, is_new: bool) {
    let mut master = Double { of_a_container: 2500, of_a_report: 1 << 20, ..Double::default() };
    let mut host = Host { containers: Containers::new(), ledger: Ledger::new(None), file: None, now: Instant::now() };
    if !is_new {
        // An earlier version of the agent reported this and stored no file.
        master.believes.insert("c4".to_owned());
    }
    host.ledger.begin(is_new);
    let mut due = true;
    for step in steps {
        match step {
            Step::Start(number) => {
                let container = container(number);
                if host.containers.insert(container.id.clone(), container.clone()).is_none() {
                    host.start(&mut master, &container, &mut due);
                    host.keep();
                }
            }
            Step::Stop(number) => {
                if host.containers.remove(&format!("c{number}")).is_some() {
                    master.believes.remove(&format!("c{number}"));
                    host.ledger.stop_taken(&format!("c{number}"));
                    host.keep();
                }
            }
            Step::Restart(ended) => {
                for number in ended {
                    host.containers.remove(&format!("c{number}"));
                }
                host.ledger = Ledger::new(host.file.clone());
                host.ledger.begin(false);
                due = true;
            }
            Step::NewSession => {
                host.ledger.begin(false);
                due = true;
            }
            Step::Forget => {
                master.believes.clear();
                host.ledger.begin(true);
                due = true;
            }
            // Other limits mean another program, which has just started.
            Step::Bounds(one, all) => {
                (master.of_a_container, master.of_a_report) = (one, all);
                host.ledger.begin(false);
                due = true;
            }
            Step::Wait => {
                host.now += TRY_WHOLE_AFTER;
                due = true;
            }
            Step::Talk(messages) => {
                for _ in 0..messages {
                    host.talk(&mut master, &mut due);
                }
            }
        }
    }
    // Nothing changes any more: a few messages must be enough.
    due = true;
    let mut messages = 0;
    while host.talk(&mut master, &mut due) {
        messages += 1;
        assert!(messages < 100, "there is no end to it: {:#?}", host.ledger);
    }
    let fits = |one: &&Container| weight(one).0 <= master.of_a_container.min(master.of_a_report);
    for one in host.containers.values().filter(fits) {
        assert!(master.believes.contains(&one.id), "{} was never told", one.id);
    }
    for id in &master.believes {
        // Excused only if the agent does not know what was reported before, and the master refuses something.
        let is_excused = host.ledger.believed.is_none();
        assert!(host.containers.contains_key(id) || is_excused, "{id} is gone and stays published");
    }
}

proptest! {
    #[test]
    fn a_master_of_any_bounds_ends_with_what_it_takes(
        steps in proptest::collection::vec(step(), 0..40),
        is_new in any::<bool>(),
    ) {
        play(steps, is_new);
    }
}

#[test]
fn after_a_restart_a_container_that_was_never_taken_keeps_no_removed_one_published() {
    use Step::{Restart, Start, Talk};
    // c8 is too large; c1 is removed while the agent is down.
    play(vec![Start(1), Start(2), Talk(5), Start(8), Talk(5), Restart(vec![1]), Talk(10)], true);
    play(vec![Start(1), Start(2), Start(8), Talk(9), Restart(vec![1]), Talk(10)], true);
}
