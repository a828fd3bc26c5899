//! Reads JSON of any size in bounded memory: Docker's answers hold whatever people wrote into labels.
//!
//! Takes bytes as they arrive and gives JSON of the same shape. It cuts texts that are too long and drops labels beyond
//! the limits below. Readers drop and report what still exceeds a limit of theirs: a cut text stays longer than any
//! text that they accept. No I/O.

/// The labels that enable a container for the agent; never dropped.
pub const ENABLE_KEYS: [&str; 2] = ["dockflare.enable", "cloudflare.tunnel.enable"];
/// Most bytes of a label's key: what masters are known to accept.
pub const KEY_BYTES: usize = 256;
/// Most bytes of a label's value.
pub const VALUE_BYTES: usize = 4096;
/// Most labels of one container that are read.
pub const LABELS: usize = 256;
/// Most bytes of these labels.
pub const CONTAINER_BYTES: usize = 64 << 10;
/// Most bytes of these labels of all containers together.
pub const REPORT_BYTES: usize = 2 << 20;

/// Longest text outside of labels: a name, a path, an argument, a variable with a token in it.
const TEXT_BYTES: usize = 8 << 10;
/// Most bytes of one container's other labels.
const OTHER_LABELS_BYTES: usize = 16 << 10;
/// Most bytes of a whole document, after all cuts.
pub const DOCUMENT_BYTES: usize = 8 << 20;
/// Deepest nesting. Docker's documents have about ten levels.
const DEPTH: usize = 64;
/// Facts that an event lists among its labels; never dropped, like the enabling labels.
const FACTS: [&str; 4] = ["name", "image", "exitCode", "containerExitCode"];
/// The fields that hold a container's labels: in a listing or an inspection, and in an event.
const MAPS: [&[u8]; 2] = [b"Labels", b"Attributes"];

/// Why reading a document stops.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Clogged {
    /// See [`DOCUMENT_BYTES`].
    #[error("has more than {} MiB also without its long texts", DOCUMENT_BYTES >> 20)]
    TooLarge,
    /// Nested deeper than any document of Docker's.
    #[error("is nested more than {DEPTH} deep")]
    TooDeep,
}

/// Filters JSON, as the module describes.
#[derive(Debug, Default)]
pub struct Sieve {
    out: Vec<u8>,
    /// Where in `out` documents end.
    ends: Vec<usize>,
    stack: Vec<Frame>,
    text: Option<Text>,
    /// Bytes of our labels in this document so far.
    spent: usize,
    /// Above zero, nothing is written to `out`.
    muted: usize,
}

#[derive(Debug, Default)]
struct Frame {
    is_object: bool,
    /// Whether a key comes next, not a value.
    wants_key: bool,
    /// The start of the last key, as much as is compared.
    key: Vec<u8>,
    labels: Option<Map>,
}

/// A map of labels, and how much of it has been kept.
#[derive(Debug, Default)]
struct Map {
    members: usize,
    ours: (usize, usize),
    others: usize,
    /// Whether the current member is dropped.
    is_muted: bool,
}

/// A text that is being read.
#[derive(Debug)]
struct Text {
    is_key: bool,
    /// Held back until its end, when the sieve decides whether to keep it.
    held: Option<Vec<u8>>,
    bytes: usize,
    most: usize,
    /// Whether the rest is skipped.
    is_cut: bool,
    /// Whether the last unit was the first half of a surrogate pair.
    is_half: bool,
    /// The escape sequence that is being read, with its backslash.
    escape: Vec<u8>,
}

impl Sieve {
    /// Takes the next bytes.
    ///
    /// # Errors
    /// [`Clogged`]; the document is lost.
    pub fn feed(&mut self, chunk: &[u8]) -> Result<(), Clogged> {
        let mut rest = chunk;
        while let Some((&byte, after)) = rest.split_first() {
            // Skips most of an over-long text in one step.
            if self.text.as_ref().is_some_and(|text| text.is_cut && text.escape.is_empty()) {
                let skipped = rest.iter().position(|byte| matches!(byte, b'"' | b'\\')).unwrap_or(rest.len());
                if skipped > 0 {
                    rest = &rest[skipped..];
                    continue;
                }
            }
            self.take(byte)?;
            rest = after;
        }
        let open = self.out.len() - self.ends.last().copied().unwrap_or(0);
        if open > DOCUMENT_BYTES { Err(Clogged::TooLarge) } else { Ok(()) }
    }

    /// Takes the first complete document.
    pub fn document(&mut self) -> Option<Vec<u8>> {
        if self.ends.is_empty() {
            return None;
        }
        let end = self.ends.remove(0);
        let rest = self.out.split_off(end);
        self.ends.iter_mut().for_each(|other| *other -= end);
        Some(std::mem::replace(&mut self.out, rest))
    }

    /// Whether no document is being read.
    pub fn is_between(&self) -> bool {
        self.stack.is_empty() && self.text.is_none()
    }

    fn take(&mut self, byte: u8) -> Result<(), Clogged> {
        if self.text.is_some() {
            self.within(byte);
            return Ok(());
        }
        match byte {
            b'"' => self.begin_text(),
            b'{' | b'[' => {
                if self.stack.len() >= DEPTH {
                    return Err(Clogged::TooDeep);
                }
                let is_object = byte == b'{';
                let is_map = self.stack.last().is_some_and(|above| {
                    above.is_object && above.labels.is_none() && MAPS.contains(&above.key.as_slice())
                });
                let labels = (is_object && is_map).then(Map::default);
                self.stack.push(Frame { is_object, wants_key: is_object, labels, ..Frame::default() });
                self.emit(byte);
            }
            b'}' | b']' => {
                self.end_member();
                self.emit(byte);
                if self.stack.pop().is_some() && self.stack.is_empty() {
                    self.ends.push(self.out.len());
                    self.spent = 0;
                }
            }
            b',' => {
                self.end_member();
                let is_map = self.stack.last().is_some_and(|frame| frame.labels.is_some());
                if !is_map {
                    self.emit(byte);
                }
                if let Some(frame) = self.stack.last_mut() {
                    frame.wants_key = frame.is_object;
                }
            }
            // A label's colon is written with its key.
            b':' if self.stack.last().is_some_and(|frame| frame.labels.is_some()) => {}
            byte if byte.is_ascii_whitespace() => {}
            byte => self.emit(byte),
        }
        Ok(())
    }

    fn emit(&mut self, byte: u8) {
        // A document is an object or a list.
        if self.muted == 0 && !self.stack.is_empty() {
            self.out.push(byte);
        }
    }

    fn begin_text(&mut self) {
        let (is_key, is_label) =
            self.stack.last().map_or((false, false), |frame| (frame.wants_key, frame.labels.is_some()));
        let most = match (is_key, is_label) {
            (true, true) => KEY_BYTES,
            (false, true) => VALUE_BYTES,
            _ => TEXT_BYTES,
        };
        if let Some(frame) = self.stack.last_mut().filter(|_| is_key) {
            frame.key.clear();
        }
        let held = (is_key && is_label).then(Vec::new);
        if held.is_none() {
            self.emit(b'"');
        }
        self.text = Some(Text { is_key, held, bytes: 0, most, is_cut: false, is_half: false, escape: Vec::new() });
    }

    fn within(&mut self, byte: u8) {
        let Some(text) = &mut self.text else { return };
        if !text.escape.is_empty() {
            text.escape.push(byte);
            let length = if text.escape[1] == b'u' { 6 } else { 2 };
            if text.escape.len() == length {
                let escape = std::mem::take(&mut text.escape);
                let half = |high: &[u8]| {
                    escape[1] == b'u'
                        && escape[2].eq_ignore_ascii_case(&b'd')
                        && high.contains(&escape[3].to_ascii_lowercase())
                };
                let (is_first, is_second) = (half(b"89ab"), half(b"cdef"));
                // A surrogate pair is one character.
                let was_half = std::mem::replace(&mut text.is_half, is_first);
                self.unit(&escape, is_second && was_half);
            }
            return;
        }
        match byte {
            b'\\' => text.escape.push(byte),
            b'"' => self.end_text(),
            // UTF-8 continuation bytes stay with the byte before them.
            byte => self.unit(&[byte], (0x80..0xc0).contains(&byte)),
        }
    }

    /// Takes a unit that must not be split: a byte or an escape. `belongs` says that it continues the unit before it.
    fn unit(&mut self, unit: &[u8], belongs: bool) {
        let Some(text) = &mut self.text else { return };
        // Keeps one character beyond the limit, so that the reader can tell that the text was cut.
        text.is_cut |= text.bytes > text.most && !belongs;
        if text.is_cut {
            return;
        }
        text.bytes += unit.len();
        match (&mut text.held, text.is_key) {
            (Some(held), _) => held.extend_from_slice(unit),
            (None, is_key) => {
                if is_key
                    && let Some(frame) = self.stack.last_mut()
                    && frame.key.len() < 16
                {
                    frame.key.extend_from_slice(unit);
                }
                unit.iter().for_each(|byte| self.emit(*byte));
            }
        }
    }

    fn end_text(&mut self) {
        let Some(text) = self.text.take() else { return };
        if text.is_key
            && let Some(frame) = self.stack.last_mut()
        {
            frame.wants_key = false;
        }
        let Some(key) = text.held else {
            let in_map =
                !text.is_key && self.muted == 0 && self.stack.last().is_some_and(|frame| frame.labels.is_some());
            if in_map {
                self.spend(text.bytes);
            }
            return self.emit(b'"');
        };
        let (bytes, spent) = (key.len(), self.spent);
        let Some(map) = self.stack.last_mut().and_then(|frame| frame.labels.as_mut()) else { return };
        let is_needed = ENABLE_KEYS.iter().chain(&FACTS).any(|needed| needed.as_bytes() == key);
        // Keeps one label beyond the limit, so that the reader can tell that labels were dropped.
        let has_room = match is_ours(&key) {
            true => map.ours.0 <= LABELS && map.ours.1 <= CONTAINER_BYTES && spent <= REPORT_BYTES,
            false => map.others + bytes <= OTHER_LABELS_BYTES,
        };
        if !is_needed && !has_room {
            map.is_muted = true;
            self.muted += 1;
            return;
        }
        let comma = if map.members > 0 { &b",\""[..] } else { b"\"" };
        map.members += 1;
        if is_ours(&key) {
            map.ours.0 += 1;
        }
        if self.muted == 0 {
            self.out.extend_from_slice(comma);
            self.out.extend_from_slice(&key);
            self.out.extend_from_slice(b"\":");
        }
        // Nothing looks up the keys of a map of labels further down.
        if let Some(frame) = self.stack.last_mut() {
            frame.key = key;
        }
        self.spend(bytes);
    }

    /// Counts the bytes of a key or a value that was kept.
    fn spend(&mut self, bytes: usize) {
        let Some(frame) = self.stack.last_mut() else { return };
        let Some(map) = frame.labels.as_mut() else { return };
        if is_ours(&frame.key) {
            map.ours.1 += bytes;
            self.spent += bytes;
        } else {
            map.others += bytes;
        }
    }

    /// Ends a member of a map of labels, and unmutes the output if the member was dropped.
    fn end_member(&mut self) {
        if let Some(map) = self.stack.last_mut().and_then(|frame| frame.labels.as_mut())
            && std::mem::take(&mut map.is_muted)
        {
            self.muted -= 1;
        }
    }
}

/// Whether any program of ours reads a label with this key, misspelled or not.
fn is_ours(key: &[u8]) -> bool {
    let has = |part: &[u8]| key.windows(part.len()).any(|window| window.eq_ignore_ascii_case(part));
    has(b"dockflare") || has(b"cloudflare") || key == b"com.docker.compose.service"
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Map as Object, Value, json};

    use super::*;

    /// The document that comes out, fed in pieces of this size.
    fn sieved(text: &str, piece: usize) -> Result<Vec<Value>, Clogged> {
        let (mut sieve, mut documents) = (Sieve::default(), Vec::new());
        for chunk in text.as_bytes().chunks(piece.max(1)) {
            sieve.feed(chunk)?;
            while let Some(document) = sieve.document() {
                documents.push(serde_json::from_slice(&document).unwrap_or_else(|error| {
                    panic!("{error}: {}", String::from_utf8_lossy(&document[..document.len().min(500)]))
                }));
            }
        }
        Ok(documents)
    }

    fn value() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            any::<String>().prop_map(Value::from),
            "[\"\\\\/\u{1f980}ü\n]{0,20}".prop_map(Value::from),
        ];
        let key = prop_oneof![any::<String>(), Just("Labels".to_owned()), Just("dockflare.enable".to_owned())];
        leaf.prop_recursive(5, 40, 8, move |inner| {
            prop_oneof![
                proptest::collection::vec(inner.clone(), 0..6).prop_map(Value::from),
                proptest::collection::btree_map(key.clone(), inner, 0..6)
                    .prop_map(|members| Value::Object(members.into_iter().collect::<Object<_, _>>())),
            ]
        })
    }

    proptest! {
        #[test]
        fn what_is_small_comes_out_as_it_went_in(value in value(), piece in 1..40_usize, pretty in any::<bool>()) {
            let text = if pretty { format!("{value:#}") } else { value.to_string() };
            // A document is an object or a list.
            let expected = if value.is_object() || value.is_array() { vec![value] } else { Vec::new() };
            prop_assert_eq!(sieved(&text, piece).unwrap(), expected);
        }

        #[test]
        fn whatever_comes_in_nothing_panics_and_little_is_kept(bytes in any::<Vec<u8>>(), piece in 1..40_usize) {
            let mut sieve = Sieve::default();
            for chunk in bytes.chunks(piece) {
                if sieve.feed(chunk).is_err() {
                    break;
                }
                drop(sieve.document());
            }
        }

        #[test]
        fn a_text_is_cut_between_letters(letter in any::<char>(), before in 0..6_usize, escaped in any::<bool>(), piece in 1..5000_usize) {
            let text = format!("{}{}", "a".repeat(before), letter.to_string().repeat(TEXT_BYTES));
            let mut quoted = json!(text).to_string();
            if escaped {
                let mut units = [0; 2];
                let escapes: String = letter.encode_utf16(&mut units).iter().map(|unit| format!("\\u{unit:04x}")).collect();
                quoted = format!("\"{}{}\"", "a".repeat(before), escapes.repeat(TEXT_BYTES));
            }
            let document = format!("[{quoted},1]");
            let out = sieved(&document, piece).unwrap();
            let cut = out[0][0].as_str().unwrap();
            prop_assert!(text.starts_with(cut) && cut.len() <= TEXT_BYTES + 16, "{}", cut.len());
            prop_assert_eq!(&out[0][1], &json!(1));
        }
    }

    #[test]
    fn a_label_that_is_too_long_stays_recognisable_as_such_and_the_others_stay_whole() {
        let labels = json!({ "dockflare.enable": "true", "dockflare.service": "x".repeat(1 << 20), "other": "y",
            "dockflare.zone": "z" });
        let text = json!([{ "Id": "1", "Labels": labels, "Names": ["/a"] }, { "Id": "2", "Labels": null }]).to_string();
        let out = sieved(&text, 1000).unwrap().remove(0);
        let labels = &out[0]["Labels"];
        let long = labels["dockflare.service"].as_str().unwrap().len();
        assert!((VALUE_BYTES + 1..VALUE_BYTES + 20).contains(&long), "{long}");
        assert_eq!((&labels["dockflare.enable"], &labels["dockflare.zone"]), (&json!("true"), &json!("z")));
        assert_eq!((&labels["other"], &out[0]["Names"], &out[1]["Id"]), (&json!("y"), &json!(["/a"]), &json!("2")));
    }

    #[test]
    fn labels_without_number_come_out_as_one_more_than_is_taken_and_never_without_what_enables() {
        let mut labels: Object<_, _> =
            (0..20_000).map(|number| (format!("dockflare.{number}.service"), json!("http://web"))).collect();
        labels.extend((0..20_000).map(|number| (format!("org.other.{number}"), json!("x".repeat(100)))));
        labels.insert("dockflare.enable".to_owned(), json!("true"));
        let text = json!([{ "Id": "1", "Labels": labels }]).to_string();
        let out = sieved(&text, 4096).unwrap().remove(0);
        let left = out[0]["Labels"].as_object().unwrap();
        assert_eq!(left["dockflare.enable"], "true");
        let ours = left.keys().filter(|key| is_ours(key.as_bytes())).count();
        assert!((LABELS + 1..LABELS + 4).contains(&ours), "{ours}");
        assert!(out.to_string().len() < CONTAINER_BYTES);
    }

    #[test]
    fn an_event_keeps_what_it_tells_beside_any_number_of_labels() {
        let mut attributes: Object<_, _> =
            (0..20_000).map(|number| (format!("a.{number}"), json!("x".repeat(100)))).collect();
        for fact in FACTS {
            attributes.insert(fact.to_owned(), json!("this"));
        }
        let event = json!({ "Action": "die", "Actor": { "Attributes": attributes }, "time": 1 }).to_string();
        let out = sieved(&event, 4096).unwrap().remove(0);
        assert!(FACTS.iter().all(|fact| out["Actor"]["Attributes"][fact] == "this"), "{out}");
        assert!(out["time"] == 1 && out.to_string().len() < 2 * OTHER_LABELS_BYTES);
    }

    #[test]
    fn many_large_containers_stay_within_one_bound() {
        let labels: Object<_, _> =
            (0..200).map(|n| (format!("dockflare.{n}.service"), json!("x".repeat(4000)))).collect();
        let mut labels = labels;
        labels.insert("dockflare.enable".to_owned(), json!("true"));
        let listed: Vec<_> = (0..60).map(|n| json!({ "Id": n.to_string(), "Labels": labels })).collect();
        let out = sieved(&json!(listed).to_string(), 65_536).unwrap().remove(0);
        assert!(out.to_string().len() < REPORT_BYTES + VALUE_BYTES + 60 * 100, "{}", out.to_string().len());
        assert!(out.as_array().unwrap().iter().all(|one| one["Labels"]["dockflare.enable"] == "true"));
    }

    #[test]
    fn documents_come_out_one_by_one() {
        let text = "{\"a\":1}\n{\"b\":[2]}\n{\"c\"";
        assert_eq!(sieved(text, 3).unwrap(), [json!({ "a": 1 }), json!({ "b": [2] })]);
        assert_eq!(sieved(&"[".repeat(100), 7), Err(Clogged::TooDeep));
    }
}
