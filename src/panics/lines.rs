//! Which panics get a line in the log of their own. Pure: the time is an argument, and nothing is written here. Whatever
//! else may happen often is bounded by it, too ([`Lines::every`]).
//!
//! Each site (a place in the source) has a few lines at once and then one per second, which says how many it stands for.
//! The count that is left when a storm ends comes out by itself: somebody asks [`Lines::take_due`] every now and then.

use std::fmt;
use std::time::{Duration, Instant};

/// Lines of one site at once: enough to see whether they are all alike.
const BURST: u32 = 5;
/// Then one for each of these.
const INTERVAL: Duration = Duration::from_secs(1);
/// Sites told apart. Code has few places that panic at a time; where a message stands in for the place it may have an
/// address in it, and then there is no end of sites: what is more than this is counted as one.
const SITES_MAX: usize = 32;
/// What that one is called.
const OTHERS: &str = "other places";

/// The sites of one executor.
pub(crate) struct Lines {
    sites: Vec<Site>,
    interval: Duration,
}

impl Default for Lines {
    fn default() -> Self {
        Self::every(INTERVAL)
    }
}

struct Site {
    name: String,
    /// Lines that may be written now.
    left: u32,
    /// Since when `left` has not grown.
    counted: Instant,
    /// Not written since the last line.
    suppressed: u64,
    said: Instant,
}

/// How many panics were not written, and over what time.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct More {
    pub count: u64,
    pub over: Duration,
}

impl fmt::Display for More {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "… and {} more like it in the last {:.1} s", self.count, self.over.as_secs_f64())
    }
}

impl Lines {
    /// A few lines of each site at once, then one for each `interval`, which is longer than nothing.
    pub(crate) fn every(interval: Duration) -> Self {
        Self { sites: Vec::new(), interval }
    }

    /// A panic at `site`: `Some` when it gets a line, with how many before it got none.
    pub(crate) fn note(&mut self, site: &str, now: Instant) -> Option<Option<More>> {
        let interval = self.interval;
        let site = self.site(site, now);
        site.refill(now, interval);
        if site.left == 0 {
            site.suppressed += 1;
            return None;
        }
        site.left -= 1;
        let more = site.take(now);
        site.said = now;
        Some(more)
    }

    /// When [`Lines::take_due`] has something, if nothing happens before.
    pub(crate) fn due(&self) -> Option<Instant> {
        self.sites.iter().filter(|site| site.suppressed > 0).map(|site| site.said + self.interval).min()
    }

    /// The counts that no line has come to tell.
    pub(crate) fn take_due(&mut self, now: Instant) -> Vec<(String, More)> {
        let interval = self.interval;
        self.take_if(now, |site| now.saturating_duration_since(site.said) >= interval)
    }

    /// All counts there are: nobody will ask again.
    pub(crate) fn take_all(&mut self, now: Instant) -> Vec<(String, More)> {
        self.take_if(now, |_| true)
    }

    fn take_if(&mut self, now: Instant, is_due: impl Fn(&Site) -> bool) -> Vec<(String, More)> {
        let due = self.sites.iter_mut().filter(|site| is_due(site));
        due.filter_map(|site| {
            let more = site.take(now)?;
            site.said = now;
            // It is a line, if a late one.
            site.left = site.left.saturating_sub(1);
            Some((site.name.clone(), more))
        })
        .collect()
    }

    fn site(&mut self, name: &str, now: Instant) -> &mut Site {
        if let Some(index) = self.sites.iter().position(|site| site.name == name) {
            return &mut self.sites[index];
        }
        if self.sites.len() >= SITES_MAX {
            // Those that have been quiet for so long that they are as good as new.
            self.sites.iter_mut().for_each(|site| site.refill(now, self.interval));
            self.sites.retain(|site| site.suppressed > 0 || site.left < BURST);
        }
        let name = if self.sites.len() < SITES_MAX { name } else { OTHERS };
        let index = self.sites.iter().position(|site| site.name == name).unwrap_or_else(|| {
            let name = name.to_owned();
            self.sites.push(Site { name, left: BURST, counted: now, suppressed: 0, said: now });
            self.sites.len() - 1
        });
        &mut self.sites[index]
    }
}

impl Site {
    fn refill(&mut self, now: Instant, interval: Duration) {
        let intervals = now.saturating_duration_since(self.counted).as_nanos() / interval.as_nanos().max(1);
        let intervals = u32::try_from(intervals).unwrap_or(u32::MAX);
        self.left = self.left.saturating_add(intervals).min(BURST);
        if self.left == BURST {
            self.counted = self.counted.max(now);
        } else {
            self.counted += interval * intervals;
        }
    }

    fn take(&mut self, now: Instant) -> Option<More> {
        let more = More { count: std::mem::take(&mut self.suppressed), over: now.saturating_duration_since(self.said) };
        (more.count > 0).then_some(more)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn ms(count: u64) -> Duration {
        Duration::from_millis(count)
    }

    #[test]
    fn a_few_at_once_then_one_a_second_with_the_count_of_those_between() {
        let (start, mut lines) = (Instant::now(), Lines::default());
        assert!((0..5).all(|_| lines.note("here", start) == Some(None)));
        assert_eq!(lines.due(), None);
        let mut said = Vec::new();
        for count in 1..=3000 {
            if let Some(more) = lines.note("here", start + ms(count)) {
                said.push((count, more.expect("some were suppressed").count));
            }
        }
        assert_eq!(said, [(1000, 999), (2000, 999), (3000, 999)]);
    }

    #[test]
    fn the_last_count_comes_out_by_itself() {
        let (start, mut lines) = (Instant::now(), Lines::default());
        assert!((0..42).filter(|_| lines.note("here", start).is_some()).count() == BURST as usize);
        assert_eq!(lines.due(), Some(start + ms(1000)));
        assert!(lines.take_due(start + ms(999)).is_empty());
        let due = lines.take_due(start + ms(1500));
        assert_eq!(due, [("here".to_owned(), More { count: 37, over: ms(1500) })]);
        assert_eq!(due[0].1.to_string(), "… and 37 more like it in the last 1.5 s");
        assert!(lines.due().is_none() && lines.take_all(start + ms(9000)).is_empty());
    }

    #[test]
    fn one_site_takes_no_lines_away_from_another() {
        let (start, mut lines) = (Instant::now(), Lines::default());
        assert!((0..1000).filter(|_| lines.note("here", start).is_some()).count() == BURST as usize);
        assert_eq!(lines.note("there", start), Some(None));
        assert_eq!(lines.take_all(start).len(), 1);
    }

    #[test]
    fn after_a_rest_there_are_a_few_at_once_again() {
        let (start, mut lines) = (Instant::now(), Lines::default());
        assert!((0..6).filter(|_| lines.note("here", start).is_some()).count() == BURST as usize);
        let later = start + Duration::from_secs(3600);
        assert_eq!(lines.take_due(later).len(), 1);
        assert_eq!((0..9).filter(|_| lines.note("here", later).is_some()).count(), 5);
    }

    #[test]
    fn sites_without_end_are_counted_as_one() {
        let (start, mut lines) = (Instant::now(), Lines::default());
        let said = (0..1000).filter(|count| lines.note(&count.to_string(), start).is_some()).count();
        assert_eq!((said, lines.sites.len()), (SITES_MAX + BURST as usize, SITES_MAX + 1));
        assert_eq!(lines.take_all(start), [(OTHERS.to_owned(), More { count: 963, over: ms(0) })]);
        // Those that have long been quiet make room.
        assert_eq!(lines.note("new", start + Duration::from_secs(60)), Some(None));
        assert_eq!(lines.sites.len(), 1);
    }

    #[test]
    fn the_time_between_two_lines_may_be_another() {
        let (start, mut lines) = (Instant::now(), Lines::every(ms(10_000)));
        let said: Vec<u64> = (0..30).filter(|s| lines.note("here", start + ms(s * 1000)).is_some()).collect();
        assert_eq!(said, [0, 1, 2, 3, 4, 10, 20]);
        assert_eq!(lines.due(), Some(start + ms(30_000)));
        assert!(lines.take_due(start + ms(29_999)).is_empty());
        assert_eq!(lines.take_due(start + ms(30_000))[0].1, More { count: 9, over: ms(10_000) });
    }

    #[test]
    fn a_clock_that_stands_still_or_goes_back_gives_no_more_lines() {
        let (start, mut lines) = (Instant::now() + Duration::from_secs(60), Lines::default());
        let said = (0..100).filter(|count| lines.note("here", start - ms(*count * 100)).is_some()).count();
        assert_eq!(said, 5);
    }
}
