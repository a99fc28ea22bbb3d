//! Derives choices from an input's bytes. After the last byte, every choice is the first.

/// The bytes that are left.
pub struct Bytes<'a>(pub &'a [u8]);

impl<'a> Bytes<'a> {
    /// True if no bytes are left.
    pub fn ended(&self) -> bool {
        self.0.is_empty()
    }

    /// The next byte; 0 at the end.
    pub fn byte(&mut self) -> u8 {
        self.take(1).first().copied().unwrap_or_default()
    }

    /// The next two bytes, big-endian.
    pub fn word(&mut self) -> u16 {
        u16::from_be_bytes([self.byte(), self.byte()])
    }

    /// True for about one in `times` byte values.
    pub fn one_in(&mut self, times: u8) -> bool {
        let byte = self.byte();
        byte > 0 && byte.is_multiple_of(times)
    }

    /// An element that the next byte chooses.
    pub fn one_of<'b, T>(&mut self, all: &'b [T]) -> &'b T {
        &all[usize::from(self.byte()) % all.len()]
    }

    /// The next `count` bytes, or those that are left.
    pub fn take(&mut self, count: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(count.min(self.0.len()));
        self.0 = rest;
        taken
    }
}
