//! Reloads: which listener of the new configuration is which of the running one, and which changes need a restart. Pure.

use std::collections::BTreeSet;

use super::{Config, Problems};
use crate::model::ListenerId;

/// Assigns listener ids in turn. Kernel counters and late messages of other threads refer to a removed listener by its id, so
/// an id is reused only after all others have been used.
#[derive(Debug, Clone, Copy, Default)]
pub struct ListenerIdAllocator {
    next: u32,
}

impl ListenerIdAllocator {
    /// The next free id below `limit`, if any.
    fn next(&mut self, limit: u32, taken: &BTreeSet<ListenerId>) -> Option<ListenerId> {
        let from = self.next;
        let free = (from..limit).chain(0..from.min(limit)).map(ListenerId).find(|id| !taken.contains(id))?;
        self.next = free.0 + 1;
        Some(free)
    }
}

impl Config {
    /// Gives this configuration the listener ids of the `running` one: a listener that exists there keeps its id, wherever it is
    /// in the file, and new ones get free ids. Listeners are identified by name, or, after a renaming, by address.
    ///
    /// `has_maps`: the kernel program's maps exist, so their sizes are fixed.
    ///
    /// # Errors
    /// [`Problems`]: what cannot be changed without a restart.
    pub fn inherit_listener_ids(
        mut self,
        running: &Config,
        has_maps: bool,
        allocator: &mut ListenerIdAllocator,
    ) -> anyhow::Result<Config> {
        self.check_map_limits(running, has_maps)?;
        let limit = self.limits.max_listeners;
        let known = |name: &str| running.listeners.iter().find(|listener| listener.name == name);
        let mut ids: Vec<Option<ListenerId>> =
            self.listeners.iter().map(|listener| known(&listener.name).map(|before| before.id)).collect();
        for (id, listener) in ids.iter_mut().zip(&self.listeners) {
            let renamed = |before: &&super::ListenerConfig| {
                before.bind == listener.bind && !self.listeners.iter().any(|other| other.name == before.name)
            };
            *id = id.or_else(|| running.listeners.iter().find(renamed).map(|before| before.id));
            // Too large only if the limit has been lowered, which is possible while there are no maps.
            *id = id.filter(|id| id.0 < limit);
        }
        let mut taken: BTreeSet<ListenerId> = ids.iter().flatten().copied().collect();
        // An id that was just given up is reused only if no other is free.
        let mut shunned = taken.clone();
        shunned.extend(running.listeners.iter().map(|listener| listener.id));
        for (id, listener) in ids.into_iter().zip(&mut self.listeners) {
            // One is always free: there are at most `limit` listeners.
            let Some(id) = id.or_else(|| allocator.next(limit, &shunned)).or_else(|| allocator.next(limit, &taken))
            else {
                continue;
            };
            listener.id = id;
            taken.insert(id);
            shunned.insert(id);
        }
        Ok(self)
    }

    fn check_map_limits(&self, running: &Config, has_maps: bool) -> Result<(), Problems> {
        let mut problems = Problems::new(&self.path);
        for (key, new, old) in [
            ("max_listeners", self.limits.max_listeners, running.limits.max_listeners),
            ("max_downstreams", self.limits.max_downstreams, running.limits.max_downstreams),
            ("max_sources", self.limits.max_sources, running.limits.max_sources),
            ("max_senders", self.limits.max_senders, running.limits.max_senders),
        ] {
            if has_maps && new != old {
                let message = format!(
                    "{new} needs a restart, since the kernel program's maps have been made for {old}; restart \
                     udp-fanout, or write {old} again"
                );
                problems.add(None, Some(format!("limits.{key}")), message);
            }
        }
        if problems.is_empty() { Ok(()) } else { Err(problems) }
    }
}

#[cfg(test)]
mod tests {
    use std::fmt::Write as _;
    use std::path::Path;

    use proptest::prelude::*;

    use super::*;
    use crate::config::MapLimits;

    fn config(limits: &str, listeners: &[(&str, u16)]) -> Config {
        let mut text = format!("limits = {{ {limits} }}\n");
        for (name, port) in listeners {
            let _ = write!(
                text,
                "[[listeners]]\nname = \"{name}\"\nbind = \"0.0.0.0:{port}\"\ndownstream = [{{ address = \"10.0.0.1:1\" }}]\n"
            );
        }
        Config::parse(&text, Path::new("c.toml")).unwrap()
    }

    fn ids(config: &Config) -> Vec<(&str, u32)> {
        config.listeners.iter().map(|listener| (listener.name.as_str(), listener.id.0)).collect()
    }

    #[test]
    fn listeners_keep_their_numbers_and_new_ones_get_new_ones() {
        let mut allocator = ListenerIdAllocator::default();
        let running = config("", &[("a", 1), ("b", 2), ("c", 3)]);
        let second =
            config("", &[("c", 3), ("d", 4), ("a", 1)]).inherit_listener_ids(&running, true, &mut allocator).unwrap();
        assert_eq!(ids(&second), [("c", 2), ("d", 3), ("a", 0)]);
        // The number that `b` had is free, and yet not given again so soon.
        let third =
            config("", &[("a", 1), ("c", 3), ("e", 5)]).inherit_listener_ids(&second, true, &mut allocator).unwrap();
        assert_eq!(ids(&third), [("a", 0), ("c", 2), ("e", 4)]);
        assert_eq!(third.listeners.iter().find(|listener| listener.id == ListenerId(4)).unwrap().name, "e");
    }

    #[test]
    fn a_listener_with_a_new_name_is_known_by_its_address() {
        let running = config("", &[("a", 1), ("b", 2)]);
        let renamed = config("", &[("b", 1), ("x", 2)])
            .inherit_listener_ids(&running, true, &mut ListenerIdAllocator::default())
            .unwrap();
        // `b` is still there, at the address that was `a`'s.
        assert_eq!(ids(&renamed), [("b", 1), ("x", 2)]);
        let renamed = config("", &[("y", 2), ("a", 1)])
            .inherit_listener_ids(&running, true, &mut ListenerIdAllocator::default())
            .unwrap();
        assert_eq!(ids(&renamed), [("y", 1), ("a", 0)]);
    }

    #[test]
    fn when_all_numbers_are_taken_one_given_up_is_used_at_once() {
        let running = config("max_listeners = 2", &[("a", 1), ("b", 2)]);
        let next = config("max_listeners = 2", &[("c", 3), ("b", 2)]);
        let next = next.inherit_listener_ids(&running, true, &mut ListenerIdAllocator::default()).unwrap();
        assert_eq!(ids(&next), [("c", 0), ("b", 1)]);
    }

    #[test]
    fn the_sizes_of_maps_need_a_restart_once_there_are_maps() {
        let running = config("", &[("a", 1)]);
        let change = |has_maps| {
            let new = config("max_listeners = 9, max_downstreams = 100", &[("a", 1)]);
            new.inherit_listener_ids(&running, has_maps, &mut ListenerIdAllocator::default())
        };
        assert_eq!(change(false).unwrap().limits.max_listeners, 9);
        let expected = "c.toml: limits.max_listeners: 9 needs a restart, since the kernel program's maps have been made for \
                        256; restart udp-fanout, or write 256 again\nc.toml: limits.max_downstreams: 100 needs a restart, \
                        since the kernel program's maps have been made for 16384; restart udp-fanout, or write 16384 again";
        assert_eq!(change(true).unwrap_err().to_string(), expected);
        // Every one of them, those added one day included.
        let MapLimits { max_listeners: _, max_downstreams: _, max_sources, max_senders } = running.limits.clone();
        for (key, value) in [("max_sources", max_sources), ("max_senders", max_senders)] {
            let new = config(&format!("{key} = {}", value + 1), &[("a", 1)]);
            let refusal =
                new.inherit_listener_ids(&running, true, &mut ListenerIdAllocator::default()).unwrap_err().to_string();
            assert!(refusal.contains(&format!("limits.{key}: {} needs a restart", value + 1)), "{refusal}");
        }
    }

    proptest! {
        #[test]
        fn numbers_are_distinct_and_within_the_limit_whatever_is_edited(
            edits in prop::collection::vec(prop::collection::btree_set(0u16..6, 1..=4), 1..20),
        ) {
            let mut allocator = ListenerIdAllocator::default();
            let mut running: Option<Config> = None;
            for edit in edits {
                let names: Vec<String> = edit.iter().map(|n| format!("n{n}")).collect();
                let listeners: Vec<(&str, u16)> = names.iter().map(String::as_str).zip(edit.iter().map(|n| n + 1)).collect();
                let mut new = config("max_listeners = 4", &listeners);
                if let Some(running) = &running {
                    new = new.inherit_listener_ids(running, true, &mut allocator).unwrap();
                    for before in &running.listeners {
                        let now = new.listeners.iter().find(|listener| listener.name == before.name);
                        prop_assert!(now.is_none_or(|now| now.id == before.id));
                    }
                }
                let distinct: BTreeSet<ListenerId> = new.listeners.iter().map(|listener| listener.id).collect();
                prop_assert_eq!(distinct.len(), new.listeners.len());
                prop_assert!(distinct.iter().all(|id| id.0 < 4));
                running = Some(new);
            }
        }
    }
}
