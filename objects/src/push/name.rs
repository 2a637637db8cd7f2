//! The last step of a push: what gives the snapshot its name.

use bytes::Bytes;
use object_store::{GetRange, PutMode, PutOptions};

use crate::answer::{Meaning, meaning, watched};
use crate::error::ObjectError;
use crate::fetch::{Source, Tries};
use crate::name::{MOST_TEXT_BYTES, Name};

/// Whether the object there has this content, or is a name of the same snapshot; `None` if there is none.
pub(super) async fn holds(source: &Source, content: &Bytes) -> Result<Option<bool>, ObjectError> {
    let most_bytes = MOST_TEXT_BYTES.max(content.len() as u64 + 1);
    match source.first(GetRange::Bounded(0..most_bytes)).await {
        Ok((_, _, found)) => Ok(Some(found == content[..] || Name::are_same(&found, content))),
        Err(ObjectError::NotFound { .. }) => Ok(None),
        Err(ObjectError::Empty { .. }) => Ok(Some(false)),
        Err(error) => Err(error),
    }
}

/// Writes the name, after all objects.
pub(super) async fn give_name(
    name: &Source,
    content: Bytes,
    replace: bool,
) -> Result<(), ObjectError> {
    let mode = if replace { PutMode::Overwrite } else { PutMode::Create };
    let mut tries = Tries::new(name);
    loop {
        let options = PutOptions { mode: mode.clone(), ..PutOptions::default() };
        let client = tries.clients()?.reading;
        let put = client.put_opts(name.url.key(), content.clone().into(), options);
        let (result, seen) = watched(put).await;
        let Err(error) = result else { return Ok(()) };
        match meaning(&error, seen).of_write() {
            // A try whose answer was lost may have written it.
            Meaning::Exists | Meaning::Replaced => {
                return match holds(name, &content).await? {
                    Some(true) => Ok(()),
                    _ => Err(ObjectError::NameTaken { url: name.url.to_string() }),
                };
            }
            failure => tries.after(failure, None).await?,
        }
    }
}
