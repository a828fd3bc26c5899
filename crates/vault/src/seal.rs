//! Keys and sealing: XChaCha20-Poly1305 with a random nonce for each record. Every key is wiped on drop.

use std::fmt;

use base64::Engine as _;
use base64::alphabet;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use chacha20poly1305::aead::{AeadInOut, KeyInit};
use chacha20poly1305::{Key as CipherKey, Tag, XChaCha20Poly1305, XNonce};
use ring::hmac;
use zeroize::{Zeroize, ZeroizeOnDrop, Zeroizing};

/// Bytes of a key.
pub(crate) const KEY_BYTES: usize = 32;
/// Bytes of a nonce. At 192 bits (XChaCha20), random nonces do not collide for any number of records.
const NONCE_BYTES: usize = 24;
/// Bytes of the tag that proves that a record is unchanged.
const TAG_BYTES: usize = 16;
/// Bytes that sealing adds to a text.
pub(crate) const OVERHEAD: usize = NONCE_BYTES + TAG_BYTES;

/// 32 secret bytes.
#[derive(Clone, PartialEq, Eq, Zeroize, ZeroizeOnDrop)]
pub struct Key([u8; KEY_BYTES]);

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Key")
    }
}

/// Why there is no key. Never contains the text that was read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// The text is neither 43 or 44 characters of base64, nor 64 of hexadecimal, nor 32 bytes. Carries its length.
    #[error(
        "it holds no key: 44 characters of base64 are expected, as dockflare-vault generate-key makes them, and it has {0} bytes"
    )]
    Shape(usize),
    /// All bytes are the same, as in a file made of zeros.
    #[error("all bytes of the key are the same: make one with dockflare-vault generate-key")]
    Constant,
    /// The system returned no random bytes.
    #[error("the system gives no random bytes ({0})")]
    Random(String),
}

const BASE64: GeneralPurposeConfig =
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent);
const STANDARD: GeneralPurpose = GeneralPurpose::new(&alphabet::STANDARD, BASE64);
const URL_SAFE: GeneralPurpose = GeneralPurpose::new(&alphabet::URL_SAFE, BASE64);

impl Key {
    /// Makes a new random key.
    ///
    /// # Errors
    /// [`KeyError::Random`].
    pub fn random() -> Result<Self, KeyError> {
        let mut key = Self([0; KEY_BYTES]);
        fill(&mut key.0)?;
        Ok(key)
    }

    pub(crate) fn from_bytes(bytes: &[u8]) -> Option<Self> {
        bytes.try_into().ok().map(Self)
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.0
    }

    /// Reads the content of a key file: base64 in either alphabet, hexadecimal, or the 32 bytes themselves. Ignores a
    /// byte order mark and white space around a text.
    ///
    /// # Errors
    /// [`KeyError::Shape`], [`KeyError::Constant`].
    pub fn read(file: &[u8]) -> Result<Self, KeyError> {
        let text = file.strip_prefix(b"\xef\xbb\xbf").unwrap_or(file).trim_ascii();
        let mut key = Self([0; KEY_BYTES]);
        let decoded = |engine: &GeneralPurpose| engine.decode(text).ok().map(Zeroizing::new);
        let bytes = match text.len() {
            64 => hex(text),
            43 | 44 => decoded(&STANDARD).or_else(|| decoded(&URL_SAFE)),
            _ => None,
        };
        match bytes.as_deref().map(Vec::as_slice).or_else(|| (file.len() == KEY_BYTES).then_some(file)) {
            Some(bytes) if bytes.len() == KEY_BYTES => key.0.copy_from_slice(bytes),
            _ => return Err(KeyError::Shape(file.len())),
        }
        if key.0.iter().all(|byte| *byte == key.0[0]) {
            return Err(KeyError::Constant);
        }
        Ok(key)
    }

    /// The text for a key file, without a line ending.
    pub fn to_text(&self) -> Zeroizing<String> {
        Zeroizing::new(URL_SAFE.encode(self.0))
    }

    /// Eight hexadecimal digits that tell keys apart and reveal nothing about them.
    pub fn id(&self) -> String {
        self.mac(b"dockflare-vault key id", &[])[..4].iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// HMAC-SHA256 of the purpose and the parts, each prefixed with its length. Each purpose gets its own hashes.
    pub(crate) fn mac(&self, purpose: &[u8], parts: &[&[u8]]) -> [u8; 32] {
        let mut context = hmac::Context::with_key(&hmac::Key::new(hmac::HMAC_SHA256, &self.0));
        for part in [purpose].iter().chain(parts) {
            context.update(&(part.len() as u64).to_be_bytes());
            context.update(part);
        }
        let mut mac = [0; 32];
        mac.copy_from_slice(context.sign().as_ref());
        mac
    }

    /// Seals a text for one place: binds `place` to it without storing `place`. Returns nonce ‖ ciphertext ‖ tag.
    pub(crate) fn seal(&self, place: &[u8], text: &[u8]) -> Result<Vec<u8>, KeyError> {
        let mut nonce = [0; NONCE_BYTES];
        fill(&mut nonce)?;
        let mut sealed = Vec::with_capacity(text.len() + OVERHEAD);
        sealed.extend_from_slice(&nonce);
        sealed.extend_from_slice(text);
        // The cipher refuses only texts of 256 GiB and more.
        let tag = self
            .cipher()
            .encrypt_inout_detached(&XNonce::from(nonce), place, sealed[NONCE_BYTES..].as_mut().into())
            .map_err(|_| KeyError::Shape(text.len()))?;
        clear_stack();
        sealed.extend_from_slice(&tag);
        Ok(sealed)
    }

    /// Returns the text if it was sealed with this key, for this place, and has not changed since.
    pub(crate) fn open(&self, place: &[u8], sealed: &[u8]) -> Option<Zeroizing<Vec<u8>>> {
        let (nonce, rest) = sealed.split_first_chunk::<NONCE_BYTES>()?;
        let (text, tag) = rest.split_last_chunk::<TAG_BYTES>()?;
        let mut text = Zeroizing::new(text.to_vec());
        let opened = self.cipher().decrypt_inout_detached(
            &XNonce::from(*nonce),
            place,
            text.as_mut_slice().into(),
            &Tag::from(*tag),
        );
        clear_stack();
        opened.is_ok().then_some(text)
    }

    fn cipher(&self) -> XChaCha20Poly1305 {
        // The cipher wipes its own copy.
        XChaCha20Poly1305::new(&CipherKey::from(self.0))
    }
}

/// Overwrites what the cipher left on the stack: it works on pieces of the text below its caller's frame.
#[inline(never)]
fn clear_stack() {
    let mut room = [0_u8; 8 << 10];
    std::hint::black_box(&mut room);
}

/// Fills the buffer with random bytes from the system.
pub(crate) fn fill(bytes: &mut [u8]) -> Result<(), KeyError> {
    getrandom::fill(bytes).map_err(|error| KeyError::Random(error.to_string()))
}

fn hex(text: &[u8]) -> Option<Zeroizing<Vec<u8>>> {
    let digit = |byte: u8| (byte as char).to_digit(16).map(|digit| digit as u8);
    text.chunks_exact(2)
        .map(|pair| Some(digit(pair[0])? << 4 | digit(pair[1])?))
        .collect::<Option<_>>()
        .map(Zeroizing::new)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_key_file_is_read_in_each_form_that_people_have() {
        let key = Key::read(b"0123456789abcdefghijklmnopqrstuv").unwrap();
        let text = key.to_text();
        let hex: String = key.0.iter().map(|byte| format!("{byte:02X}")).collect();
        for form in [
            text.as_str(),
            &format!("{}\n", *text),
            text.trim_end_matches('='),
            &format!("\u{feff} {}\r\n", *text),
            &hex,
        ] {
            assert_eq!(Key::read(form.as_bytes()).unwrap(), key, "{form:?}");
        }
        for (bad, length) in [("", 0), ("short", 5), (&text[1..], 43), (&hex[1..], 63)] {
            let error = Key::read(bad.as_bytes()).unwrap_err();
            assert!(matches!(error, KeyError::Shape(n) if n == length), "{bad:?}: {error}");
        }
        assert_eq!(Key::read(&[0; 32]), Err(KeyError::Constant));
        assert_eq!(format!("{key:?}"), "Key");
        assert_eq!(key.id().len(), 8);
    }

    proptest! {
        #[test]
        fn what_is_sealed_opens_in_its_place_only_and_no_bit_of_it_can_change(
            text in prop::collection::vec(any::<u8>(), 0..80), flip in any::<prop::sample::Index>(), bit in 0u8..8,
        ) {
            let (key, other) = (Key::random().unwrap(), Key::random().unwrap());
            let sealed = key.seal(b"here", &text).unwrap();
            let opened = key.open(b"here", &sealed).unwrap();
            prop_assert_eq!(opened.as_slice(), text.as_slice());
            prop_assert!(key.open(b"there", &sealed).is_none());
            prop_assert!(other.open(b"here", &sealed).is_none());
            prop_assert!(key.open(b"here", &sealed[1..]).is_none());
            let mut changed = sealed.clone();
            let at = flip.index(changed.len());
            changed[at] ^= 1u8 << bit;
            prop_assert!(key.open(b"here", &changed).is_none());
            prop_assert_ne!(key.seal(b"here", &text).unwrap(), sealed);
        }
    }
}
