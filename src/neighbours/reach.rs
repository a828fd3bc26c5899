//! Tries whether something listens where a label leads: one connection from the tunnel's own network, which proves more
//! than any declared port.
//!
//! Each address is tried once per start of its container. An accepted connection is not tried again. A refused one is
//! tried again after growing pauses, because a program may take time to start. Owned by the task; after a crash
//! everything is tried once more.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::net::SocketAddr;
use std::time::Duration;

use futures_util::{StreamExt, stream};
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout};

use super::survey::Judged;
use super::way::{Block, Try, Way};

/// Time limit of a connection. A neighbour answers in a millisecond, or not at all.
const LIMIT: Duration = Duration::from_secs(2);
/// Connections open at the same time.
const AT_ONCE: usize = 16;
/// Connections in one look. The next look tries the others.
const MOST_IN_A_LOOK: usize = 256;
/// A program that refuses connections for less than this may still be starting.
const PATIENCE: Duration = Duration::from_secs(60);
/// Time between two tries of a refused address.
const FIRST_PAUSE: Duration = Duration::from_secs(2);
const LONGEST_PAUSE: Duration = Duration::from_secs(300);

/// The outcome of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Answer {
    Taken,
    Refused,
    /// No answer: a firewall, or a paused container.
    Silent,
}

/// The outcome of each try, by container id and address.
#[derive(Debug, Default)]
pub(super) struct Reach {
    tried: BTreeMap<(String, SocketAddr), Tried>,
}

#[derive(Debug)]
struct Tried {
    life: String,
    answer: Answer,
    /// When the current run of refusals began.
    since: Instant,
    next: Instant,
    pause: Duration,
}

/// Opens one connection and sends nothing.
pub(super) async fn connect(to: SocketAddr) -> Answer {
    match timeout(LIMIT, TcpStream::connect(to)).await {
        Ok(Ok(_)) => Answer::Taken,
        Ok(Err(error)) if error.kind() == ErrorKind::ConnectionRefused => Answer::Refused,
        Ok(Err(_)) | Err(_) => Answer::Silent,
    }
}

impl Reach {
    /// Tries new and due addresses, if the agent is on the tunnel's network. To prove that, it first connects to
    /// cloudflared's own port there, `tunnel`. The same address on another network would prove nothing.
    pub(super) async fn try_out(&mut self, judged: &[Judged], tunnel: Option<SocketAddr>) {
        let due = self.due(judged, Instant::now());
        if let Some(tunnel) = tunnel.filter(|_| !due.is_empty())
            && connect(tunnel).await == Answer::Taken
        {
            let tries = stream::iter(due).map(|(id, at, life)| async move { (id, at, life, connect(at).await) });
            let mut answers = tries.buffer_unordered(AT_ONCE);
            while let Some((id, at, life, answer)) = answers.next().await {
                self.note(id, at, life, answer, Instant::now());
            }
        }
        self.postpone(Instant::now());
    }

    /// Makes what was due but could not be tried wait as if it had been refused again.
    fn postpone(&mut self, now: Instant) {
        let late = self.tried.values_mut().filter(|tried| tried.answer == Answer::Refused && tried.next <= now);
        for tried in late {
            tried.pause = (tried.pause * 2).min(LONGEST_PAUSE);
            tried.next = now + tried.pause;
        }
    }

    fn due(&self, judged: &[Judged], now: Instant) -> Vec<(String, SocketAddr, String)> {
        let mut due = Vec::new();
        for one in judged.iter().filter(|one| matches!(one.way, Way::Open { .. })) {
            for its_try in &one.tries {
                let known = self.tried.get(&(one.id.clone(), its_try.at)).filter(|tried| tried.life == one.life);
                if known.is_none_or(|tried| tried.answer == Answer::Refused && tried.next <= now) {
                    due.push((one.id.clone(), its_try.at, one.life.clone()));
                }
            }
        }
        due.truncate(MOST_IN_A_LOOK);
        due
    }

    fn note(&mut self, id: String, at: SocketAddr, life: String, answer: Answer, now: Instant) {
        let before = self.tried.remove(&(id.clone(), at));
        let before = before.filter(|tried| tried.life == life && tried.answer == Answer::Refused);
        let (since, pause) = match before {
            Some(tried) => (tried.since, (tried.pause * 2).min(LONGEST_PAUSE)),
            None => (now, FIRST_PAUSE),
        };
        self.tried.insert((id, at), Tried { life, answer, since, next: now + pause, pause });
    }

    /// Combines the verdict with the tries. Returns `None` while a refusal may come from a program that is starting.
    pub(super) fn settle(&self, one: &Judged) -> Option<Way> {
        let Way::Open { service, network, .. } = &one.way else { return Some(one.way.clone()) };
        let now = Instant::now();
        let (mut waits, mut all_taken) = (false, !one.tries.is_empty());
        for its_try in &one.tries {
            let tried = self.tried.get(&(one.id.clone(), its_try.at)).filter(|tried| tried.life == one.life);
            all_taken &= tried.is_some_and(|tried| tried.answer == Answer::Taken);
            match tried.filter(|tried| tried.answer == Answer::Refused) {
                Some(tried) if now - tried.since >= PATIENCE => return Some(Way::Blocked(its_try.refused.clone())),
                Some(_) => waits = true,
                None => {}
            }
        }
        match (waits, all_taken) {
            (true, _) => None,
            (false, true) => Some(Way::Open { service: service.clone(), network: network.clone(), note: None }),
            (false, false) => Some(one.way.clone()),
        }
    }

    /// The block behind a refusal, however recent.
    pub(super) fn refusal<'a>(&self, one: &'a Judged) -> Option<&'a Block> {
        let is_refused = |its_try: &&Try| {
            let tried = self.tried.get(&(one.id.clone(), its_try.at)).filter(|tried| tried.life == one.life);
            tried.is_some_and(|tried| tried.answer == Answer::Refused)
        };
        one.tries.iter().find(is_refused).map(|its_try| &its_try.refused)
    }

    /// The time until something is due again.
    pub(super) fn due_in(&self) -> Option<Duration> {
        let refused = self.tried.values().filter(|tried| tried.answer == Answer::Refused);
        refused.map(|tried| tried.next.saturating_duration_since(Instant::now())).min()
    }

    /// Forgets containers that no longer run.
    pub(super) fn forget_all_but(&mut self, runs: impl Fn(&str) -> bool) {
        self.tried.retain(|(id, _), _| runs(id));
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use tokio::net::TcpListener;
    use tokio::time::advance;

    use super::super::way::Cause;
    use super::*;

    fn judged(life: &str, at: &[SocketAddr], note: Option<&str>) -> Judged {
        let refused = |at: &SocketAddr| Block { cause: Cause::Refused, problem: at.to_string(), remedy: "r".into() };
        Judged {
            id: "id".into(),
            name: "web".into(),
            life: life.into(),
            way: Way::Open { service: "s".into(), network: "net".into(), note: note.map(str::to_owned) },
            tries: at.iter().map(|at| Try { at: *at, refused: refused(at) }).collect(),
            networks: BTreeSet::new(),
        }
    }

    fn note_of(way: Option<Way>) -> Option<Option<String>> {
        match way {
            Some(Way::Open { note, .. }) => Some(note),
            Some(_) | None => None,
        }
    }

    const AT: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::new(172, 18, 0, 3)), 80);

    #[tokio::test(start_paused = true)]
    async fn what_answers_is_what_counts_and_a_refusal_counts_after_a_minute() {
        let mut reach = Reach::default();
        let one = judged("1", &[AT], Some("declared"));
        let note = |reach: &mut Reach, life: &str, answer| {
            reach.note("id".into(), AT, life.into(), answer, Instant::now());
        };
        assert_eq!(note_of(reach.settle(&one)), Some(Some("declared".into())), "never tried");
        note(&mut reach, "1", Answer::Silent);
        assert_eq!(note_of(reach.settle(&one)), Some(Some("declared".into())), "a silence proves nothing");
        note(&mut reach, "1", Answer::Taken);
        assert_eq!(note_of(reach.settle(&one)), Some(None));
        assert!(reach.due(std::slice::from_ref(&one), Instant::now()).is_empty(), "once is enough");
        // Started again.
        let again = judged("2", &[AT], None);
        assert_eq!(reach.due(std::slice::from_ref(&again), Instant::now()).len(), 1);
        let mut tries = 0;
        let began = Instant::now();
        while !matches!(reach.settle(&again), Some(Way::Blocked(_))) {
            note(&mut reach, "2", Answer::Refused);
            tries += 1;
            assert!(reach.due(std::slice::from_ref(&again), Instant::now()).is_empty(), "not at once");
            let Some(wait) = reach.due_in() else { panic!("it is tried again") };
            assert!(matches!(reach.settle(&again), None | Some(Way::Blocked(_))));
            advance(wait).await;
        }
        assert!((60..130).contains(&began.elapsed().as_secs()) && tries < 8, "{:?} {tries}", began.elapsed());
        note(&mut reach, "2", Answer::Taken);
        assert_eq!((note_of(reach.settle(&again)), reach.due_in()), (Some(None), None));
        reach.forget_all_but(|_| false);
        assert_eq!(reach.due(&[again], Instant::now()).len(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn what_cannot_be_tried_any_more_does_not_make_it_look_without_a_pause() {
        let mut reach = Reach::default();
        reach.note("id".into(), AT, "1".into(), Answer::Refused, Instant::now());
        let mut looks = 0;
        let began = Instant::now();
        while began.elapsed() < Duration::from_secs(3600) {
            advance(reach.due_in().unwrap_or(LONGEST_PAUSE)).await;
            reach.try_out(&[], None).await;
            looks += 1;
        }
        assert!(looks < 25, "{looks}");
    }

    #[tokio::test]
    async fn nothing_is_tried_from_outside_of_the_tunnels_network() {
        let (open, shut) = (TcpListener::bind("127.0.0.1:0").await.unwrap(), {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            listener.local_addr().unwrap()
        });
        let at = open.local_addr().unwrap();
        let ones = [judged("1", &[at, shut], None)];
        let mut reach = Reach::default();
        for tunnel in [None, Some(shut)] {
            reach.try_out(&ones, tunnel).await;
            assert!(reach.tried.is_empty(), "{tunnel:?}");
        }
        reach.try_out(&ones, Some(at)).await;
        let answers: Vec<_> = [at, shut].iter().map(|at| reach.tried[&("id".into(), *at)].answer).collect();
        assert_eq!(answers, [Answer::Taken, Answer::Refused]);
        assert_eq!(reach.settle(&ones[0]), None);
    }
}
