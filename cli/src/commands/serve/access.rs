//! Which users may connect to a server.

use anyhow::{Result, bail};
use pager::serve::{AllowedUsers, SocketAccess};

use crate::user_id;

/// Which users may connect. Each also needs the permission to write to the socket, and to enter its folder.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Access {
    /// Serve guests of this user, too. Once for each user. By default only this user and root are served.
    #[arg(long, value_name = "UID", value_parser = user_id::parse)]
    allow_uid: Vec<u32>,

    /// Serve guests of users in this group, too. Once for each group.
    #[arg(long, value_name = "GID", value_parser = user_id::parse)]
    allow_gid: Vec<u32>,

    /// Give the socket to this user, or this group, by numbers. Another user than this one takes root.
    #[arg(long, value_name = "UID[:GID]", value_parser = parse_owner, requires = "listen")]
    socket_owner: Option<Owner>,

    /// The permissions of the socket, in octal; connecting takes the permission to write. [default: 600]
    #[arg(long, value_name = "MODE", value_parser = parse_mode, requires = "listen")]
    socket_mode: Option<u32>,
}

/// `UID`, `UID:GID` or `:GID`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Owner {
    uid: Option<u32>,
    gid: Option<u32>,
}

fn parse_owner(text: &str) -> Result<Owner, String> {
    let number = |text: &str| match text {
        "" => Ok(None),
        text => user_id::parse(text).map(Some),
    };
    let (uid, gid) = text.split_once(':').unwrap_or((text, ""));
    match (number(uid)?, number(gid)?) {
        (None, None) => Err("expected UID, UID:GID or :GID, as numbers".into()),
        (uid, gid) => Ok(Owner { uid, gid }),
    }
}

fn parse_mode(text: &str) -> Result<u32, String> {
    match u32::from_str_radix(text, 8) {
        Ok(mode @ 0..=0o777) => Ok(mode),
        _ => Err("expected permissions in octal, at most 777".into()),
    }
}

impl Access {
    /// Whether other users are named.
    pub(super) fn names_users(&self) -> bool {
        !self.allow_uid.is_empty() || !self.allow_gid.is_empty() || self.socket_owner.is_some()
    }

    /// Refuses a socket for users whom a server of the user `own` would not serve.
    pub(super) fn check(&self, own: u32) -> Result<()> {
        let allowed = |uid: &u32| {
            *uid == 0 || *uid == own || self.allow_uid.contains(uid) || !self.allow_gid.is_empty()
        };
        match self.socket_owner.and_then(|owner| owner.uid) {
            Some(uid) if !allowed(&uid) => {
                bail!(
                    "--socket-owner gives the socket to user {uid}, who is not served: add --allow-uid {uid}"
                )
            }
            _ => Ok(()),
        }
    }

    pub(super) fn allowed(&self) -> AllowedUsers {
        let mut allowed = AllowedUsers::default();
        allowed.uids.clone_from(&self.allow_uid);
        allowed.gids.clone_from(&self.allow_gid);
        allowed
    }

    pub(super) fn socket(&self) -> SocketAccess {
        let mut access = SocketAccess::default();
        access.mode = self.socket_mode;
        if let Some(Owner { uid, gid }) = self.socket_owner {
            (access.uid, access.gid) = (uid, gid);
        }
        access
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn owners_and_modes_are_numbers() {
        let owner = |uid, gid| Ok(Owner { uid, gid });
        assert_eq!(parse_owner("7"), owner(Some(7), None));
        assert_eq!(parse_owner("7:8"), owner(Some(7), Some(8)));
        assert_eq!(parse_owner(":8"), owner(None, Some(8)));
        for bad in ["", ":", "me", "7:us", "-1"] {
            assert!(parse_owner(bad).is_err(), "{bad}");
        }
        assert_eq!(parse_mode("0660"), Ok(0o660));
        for bad in ["", "8", "1777", "rw"] {
            assert!(parse_mode(bad).is_err(), "{bad}");
        }
    }
}
