//! Reads a file without changing it: keeps all writes in memory.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::unix::fs::FileExt;
use std::sync::{Mutex, PoisonError};

use redb::StorageBackend;

/// Bytes per piece kept in memory: the size of the database's own pages.
const PIECE: u64 = 4096;

/// The database opens on this first. That detects a file that it cannot accept, or would repair into something other
/// than what was stored, before a single byte of the file changes.
#[derive(Debug)]
pub(super) struct Overlay {
    file: File,
    written: Mutex<Written>,
}

#[derive(Debug)]
struct Written {
    len: u64,
    /// How much of the file still counts. After a cut, bytes beyond this read as zeros when the file grows again.
    file_len: u64,
    pieces: BTreeMap<u64, Vec<u8>>,
}

impl Overlay {
    pub(super) fn new(file: File) -> io::Result<Self> {
        let len = file.metadata()?.len();
        Ok(Self { file, written: Mutex::new(Written { len, file_len: len, pieces: BTreeMap::new() }) })
    }

    /// Reads one piece from the file itself.
    fn original(&self, at: u64, file_len: u64) -> io::Result<Vec<u8>> {
        let mut piece = vec![0; PIECE as usize];
        let start = at * PIECE;
        let there = file_len.saturating_sub(start).min(PIECE) as usize;
        self.file.read_exact_at(&mut piece[..there], start)?;
        Ok(piece)
    }
}

/// Splits a range at the borders of pieces. Each part: piece number, offset in the piece, offset in the range, length.
fn parts(offset: u64, len: usize) -> impl Iterator<Item = (u64, usize, usize, usize)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        let at = offset + done as u64;
        let within = (at % PIECE) as usize;
        let take = (PIECE as usize - within).min(len - done);
        let part = (at / PIECE, within, done, take);
        done += take;
        (take > 0).then_some(part)
    })
}

impl StorageBackend for Overlay {
    fn len(&self) -> io::Result<u64> {
        Ok(self.written.lock().unwrap_or_else(PoisonError::into_inner).len)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let written = self.written.lock().unwrap_or_else(PoisonError::into_inner);
        if offset.checked_add(out.len() as u64).is_none_or(|end| end > written.len) {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        for (piece, within, at, take) in parts(offset, out.len()) {
            let out = &mut out[at..at + take];
            match written.pieces.get(&piece) {
                Some(bytes) => out.copy_from_slice(&bytes[within..within + take]),
                None => out.copy_from_slice(&self.original(piece, written.file_len)?[within..within + take]),
            }
        }
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let mut written = self.written.lock().unwrap_or_else(PoisonError::into_inner);
        if len < written.len {
            written.file_len = written.file_len.min(len);
            written.pieces.split_off(&len.div_ceil(PIECE));
            let tail = (len % PIECE) as usize;
            if let Some(last) = written.pieces.get_mut(&(len / PIECE)) {
                last[tail..].fill(0);
            }
        }
        written.len = len;
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut written = self.written.lock().unwrap_or_else(PoisonError::into_inner);
        for (piece, within, at, take) in parts(offset, data.len()) {
            if !written.pieces.contains_key(&piece) {
                let original = self.original(piece, written.file_len)?;
                written.pieces.insert(piece, original);
            }
            if let Some(bytes) = written.pieces.get_mut(&piece) {
                bytes[within..within + take].copy_from_slice(&data[at..at + take]);
            }
        }
        written.len = written.len.max(offset + data.len() as u64);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use proptest::prelude::*;

    use super::*;

    #[derive(Debug, Clone)]
    enum Act {
        Write(u64, Vec<u8>),
        Cut(u64),
    }

    proptest! {
        #[test]
        fn it_reads_like_a_file_and_leaves_the_real_one_alone(
            start in prop::collection::vec(any::<u8>(), 0..9000),
            acts in prop::collection::vec(prop_oneof![
                (0u64..12000, prop::collection::vec(any::<u8>(), 0..6000)).prop_map(|(at, data)| Act::Write(at, data)),
                (0u64..14000).prop_map(Act::Cut),
            ], 0..8),
        ) {
            let mut file = tempfile::NamedTempFile::new().unwrap();
            file.write_all(&start).unwrap();
            let overlay = Overlay::new(file.reopen().unwrap()).unwrap();
            let mut model = start.clone();
            for act in acts {
                match act {
                    Act::Write(at, data) => {
                        overlay.write(at, &data).unwrap();
                        let end = at as usize + data.len();
                        model.resize(model.len().max(end), 0);
                        model[at as usize..end].copy_from_slice(&data);
                    }
                    Act::Cut(len) => {
                        overlay.set_len(len).unwrap();
                        model.resize(len as usize, 0);
                    }
                }
                let mut all = vec![0; overlay.len().unwrap() as usize];
                overlay.read(0, &mut all).unwrap();
                prop_assert_eq!(&all, &model);
                prop_assert!(overlay.read(1, &mut all).is_err() || all.is_empty());
            }
            let mut real = vec![];
            file.reopen().unwrap().read_to_end(&mut real).unwrap();
            prop_assert_eq!(real, start);
        }
    }
}
