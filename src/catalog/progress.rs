//! Who owns a sink's progress: the catalog or the target.

use super::Registered;
use crate::{
    error::{Error, Result},
    sink::Progress,
};

/// The progress from which a sink goes on, given what the catalog has and what the target keeps.
///
/// Within an epoch a target that keeps progress wins, because it moved with the data; a target of
/// an older epoch was rewound, so the catalog wins. A target whose progress is missing though
/// something was delivered, or is of another history, is never guessed about.
pub fn reconcile(
    name: &str,
    catalog: &Registered,
    target: Option<Progress>,
    target_keeps_progress: bool,
) -> Result<Progress> {
    let own = catalog.progress;
    if !target_keeps_progress {
        return Ok(own);
    }
    let Some(target) = target else {
        return match catalog.started {
            false => Ok(own),
            true => Err(Error::config(format!(
                "the target of sink {name} has lost its progress: offset {} of epoch {} was \
                 delivered to it",
                own.cursor, own.epoch
            ))
            .remedy("put the target back, or give the sink a new name so that it starts over")),
        };
    };
    if target.lineage != own.lineage {
        return Err(Error::config(format!(
            "the target of sink {name} was written from another history ({}) than the \
                 journal's ({})",
            target.lineage, own.lineage
        ))
        .remedy("give the sink an empty target, or put data_dir back"));
    }
    match target.epoch.cmp(&own.epoch) {
        std::cmp::Ordering::Equal => Ok(target),
        std::cmp::Ordering::Less => Ok(own),
        std::cmp::Ordering::Greater => Err(Error::config(format!(
            "the target of sink {name} is in epoch {}, the catalog only in {}: data_dir is older \
             than the target",
            target.epoch, own.epoch
        ))
        .remedy("put back the newer data_dir, or give the sink an empty target")),
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;
    use crate::error::Class;

    fn progress(epoch: u64, cursor: u64) -> Progress {
        Progress { lineage: Uuid::nil(), epoch, cursor, retry_seq: 0 }
    }

    fn decide(started: bool, target: Option<Progress>, keeps: bool) -> Result<Progress> {
        let source = "app".to_owned();
        let paused = None;
        let catalog = Registered { source, progress: progress(2, 10), started, paused };
        reconcile("lake", &catalog, target, keeps)
    }

    #[test]
    fn within_an_epoch_the_target_wins() {
        assert_eq!(decide(true, Some(progress(2, 14)), true).unwrap(), progress(2, 14));
        assert_eq!(decide(true, Some(progress(2, 4)), true).unwrap(), progress(2, 4));
    }

    #[test]
    fn after_a_rewind_the_catalog_wins() {
        assert_eq!(decide(true, Some(progress(1, 99)), true).unwrap(), progress(2, 10));
    }

    #[test]
    fn a_target_that_keeps_nothing_follows_the_catalog() {
        assert_eq!(decide(true, None, false).unwrap(), progress(2, 10));
        assert_eq!(decide(false, None, true).unwrap(), progress(2, 10));
    }

    #[test]
    fn lost_foreign_and_newer_targets_stop_the_sink() {
        let foreign = Progress { lineage: Uuid::max(), ..progress(2, 10) };
        for target in [None, Some(foreign), Some(progress(3, 1))] {
            assert_eq!(decide(true, target, true).unwrap_err().class(), Class::Config);
        }
    }
}
