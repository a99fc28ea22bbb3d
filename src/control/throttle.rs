//! Limits how many datagrams are traced in a second, so that tracing a busy listener costs hardly anything. Pure.

use std::time::{Duration, Instant};

/// Datagrams traced in one second at most.
pub const MAX_PER_SECOND: u32 = 1_000;
const WINDOW: Duration = Duration::from_secs(1);

/// Counts traced datagrams in windows of one second.
#[derive(Debug, Default)]
pub struct TraceThrottle {
    count: u32,
    window_start: Option<Instant>,
}

impl TraceThrottle {
    /// Counts a datagram. Once the window is full, the time at which it ends.
    ///
    /// # Errors
    /// When the datagram is one too many; says until when tracing is to pause.
    pub fn count(&mut self, now: Instant) -> Result<(), Instant> {
        let start = match self.window_start {
            Some(start) if now.duration_since(start) < WINDOW => start,
            _ => {
                self.count = 0;
                *self.window_start.insert(now)
            }
        };
        self.count += 1;
        if self.count > MAX_PER_SECOND { Err(start + WINDOW) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_has_room_for_a_thousand_datagrams() {
        let start = Instant::now();
        let at = |millis| start + Duration::from_millis(millis);
        let mut throttle = TraceThrottle::default();
        for n in 0..MAX_PER_SECOND {
            assert_eq!(throttle.count(at(u64::from(n) / 2)), Ok(()));
        }
        assert_eq!(throttle.count(at(600)), Err(at(1_000)));
        assert_eq!(throttle.count(at(999)), Err(at(1_000)));
        // The next window begins with its first datagram.
        assert_eq!(throttle.count(at(1_500)), Ok(()));
        for _ in 1..MAX_PER_SECOND {
            assert_eq!(throttle.count(at(2_499)), Ok(()));
        }
        assert_eq!(throttle.count(at(2_499)), Err(at(2_500)));
    }
}
