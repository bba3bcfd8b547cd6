//! The ids that consumers acknowledge by. An id says which message it means, so that nothing has to
//! be remembered for it, and it is the same on every delivery.
//!
//! ```text
//! 48 bits   4         12       2          32     30
//! offset    version   offset   variant    part   history, sink and epoch
//! ```
//!
//! Version and variant are those of a random UUID, which consumers of Sequin may check for.

use sha2::{Digest, Sha256};
use uuid::{Builder, Uuid};

use super::feed::Place;
use crate::sink::Progress;

const LOW_BITS: u128 = 0xFFF;
const TAG_BITS: u32 = 30;
const TAG: u32 = (1 << TAG_BITS) - 1;

/// The ids of one sink in one epoch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct AckIds {
    tag: u32,
}

impl AckIds {
    pub(super) fn new(sink: &str, progress: &Progress) -> Self {
        let mut hash = Sha256::new();
        hash.update(progress.lineage);
        hash.update(progress.epoch.to_be_bytes());
        hash.update(sink);
        let digest = hash.finalize();
        let tag = digest.first_chunk().map_or(0, |bytes| u32::from_be_bytes(*bytes));
        Self { tag: tag & TAG }
    }

    pub(super) fn of(self, place: Place) -> Uuid {
        let offset = u128::from(place.offset);
        let (high, low) = (offset >> 12, offset & LOW_BITS);
        let end = u128::from(place.part) << TAG_BITS | u128::from(self.tag);
        Builder::from_random_bytes((high << 80 | low << 64 | end).to_be_bytes()).into_uuid()
    }

    /// The message that is meant; `None` for an id of another sink, epoch or history.
    pub(super) fn place_of(self, id: &Uuid) -> Option<Place> {
        let id = id.as_u128();
        let offset = u64::try_from(id >> 80 << 12 | id >> 64 & LOW_BITS).ok()?;
        let part = u32::try_from(id >> TAG_BITS & u128::from(u32::MAX)).ok()?;
        let place = Place { offset, part };
        (self.of(place).as_u128() == id).then_some(place)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn ids(sink: &str, epoch: u64) -> AckIds {
        let lineage = Uuid::from_u128(7);
        AckIds::new(sink, &Progress { lineage, epoch, cursor: 0, retry_seq: 0 })
    }

    proptest! {
        #[test]
        fn an_id_names_its_message(offset in 0u64..1 << 53, part in any::<u32>()) {
            let (ids, place) = (ids("a", 1), Place { offset, part });
            let id = ids.of(place);
            prop_assert_eq!(id.get_version_num(), 4);
            prop_assert_eq!(id.get_variant(), uuid::Variant::RFC4122);
            prop_assert_eq!(ids.place_of(&id), Some(place));
        }

        #[test]
        fn no_other_id_names_a_message(id in any::<u128>()) {
            let ids = ids("a", 1);
            let id = Uuid::from_u128(id);
            if let Some(place) = ids.place_of(&id) {
                prop_assert_eq!(ids.of(place), id);
            }
        }
    }

    #[test]
    fn ids_of_other_sinks_and_epochs_mean_nothing() {
        let place = Place { offset: 5, part: 0 };
        let id = ids("a", 1).of(place);
        assert_eq!(ids("b", 1).place_of(&id), None);
        assert_eq!(ids("a", 2).place_of(&id), None);
    }
}
