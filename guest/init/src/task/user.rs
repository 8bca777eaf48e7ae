//! Who the task runs as: `user[:group]` of an OCI image, by number or by name.

use std::collections::BTreeSet;

/// A numeric identity.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// User.
    pub uid: u32,
    /// Primary group.
    pub gid: u32,
    /// Supplementary groups.
    pub groups: Vec<u32>,
    /// Home directory, from the image's passwd.
    pub home: Option<String>,
}

/// The user or the group is not in the image.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum UserError {
    /// No such user.
    #[error("the image's /etc/passwd has no user {0:?}; name one that it has, or give a number")]
    NoUser(String),
    /// No such group.
    #[error("the image's /etc/group has no group {0:?}; name one that it has, or give a number")]
    NoGroup(String),
}

struct PasswdEntry<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
    home: &'a str,
}

/// The well-formed lines of passwd(5); others are passed over, as libc does.
fn passwd(text: &str) -> impl Iterator<Item = PasswdEntry<'_>> {
    text.lines().filter_map(|line| {
        let mut fields = line.split(':');
        let (name, _password) = (fields.next()?, fields.next()?);
        let (uid, gid) = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
        let (_comment, home) = (fields.next()?, fields.next()?);
        (!name.is_empty()).then_some(PasswdEntry { name, uid, gid, home })
    })
}

/// Name, number and members of the well-formed lines of group(5).
fn groups(text: &str) -> impl Iterator<Item = (&str, u32, &str)> {
    text.lines().filter_map(|line| {
        let mut fields = line.split(':');
        let (name, _password, gid) = (fields.next()?, fields.next()?, fields.next()?.parse().ok()?);
        (!name.is_empty()).then_some((name, gid, fields.next().unwrap_or("")))
    })
}

/// Resolves `spec` against the contents of an image's passwd and group.
///
/// As in Docker: a number need not be in passwd, then its group is 0; a name wins over a number;
/// supplementary groups are those that list the user, unless a group is named explicitly.
pub fn resolve(spec: &str, passwd_text: &str, group_text: &str) -> Result<Identity, UserError> {
    let (user, group) = match spec.split_once(':') {
        Some((user, group)) => (user, Some(group).filter(|group| !group.is_empty())),
        None => (spec, None),
    };
    let user = if user.is_empty() { "0" } else { user };
    let number: Option<u32> = user.parse().ok();
    let by_name = passwd(passwd_text).find(|entry| entry.name == user);
    let entry = by_name.or_else(|| number.and_then(|uid| passwd(passwd_text).find(|entry| entry.uid == uid)));
    let uid =
        entry.as_ref().map(|entry| entry.uid).or(number).ok_or_else(|| UserError::NoUser(user.to_owned()))?;

    let (gid, supplementary) = match group {
        Some(group) => (group_number(group, group_text)?, BTreeSet::new()),
        None => {
            let name = entry.as_ref().map(|entry| entry.name);
            let listed =
                groups(group_text).filter(|(_, _, members)| members.split(',').any(|m| Some(m) == name));
            (entry.as_ref().map_or(0, |entry| entry.gid), listed.map(|(_, gid, _)| gid).collect())
        }
    };
    let home = entry.map(|entry| entry.home.to_owned()).filter(|home| !home.is_empty());
    Ok(Identity { uid, gid, groups: supplementary.into_iter().collect(), home })
}

fn group_number(group: &str, group_text: &str) -> Result<u32, UserError> {
    let named = groups(group_text).find(|(name, _, _)| *name == group).map(|(_, gid, _)| gid);
    named.or_else(|| group.parse().ok()).ok_or_else(|| UserError::NoGroup(group.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PASSWD: &str =
        "root:x:0:0:root:/root:/bin/sh\nbroken line\nada:x:1000:1000:,,,:/home/ada:/bin/sh\n:x:9:9::/:\n";
    const GROUP: &str =
        "root:x:0:\nada:x:1000:\nvideo:x:44:ada,bob\nrender:x:105:bob,ada\nadabob:x:7:adabob\n";

    fn who(spec: &str) -> (u32, u32, Vec<u32>) {
        let identity = resolve(spec, PASSWD, GROUP).unwrap();
        (identity.uid, identity.gid, identity.groups)
    }

    #[test]
    fn users_resolve_as_in_docker() {
        assert_eq!(who(""), (0, 0, vec![]));
        assert_eq!(who("ada"), (1000, 1000, vec![44, 105]));
        assert_eq!(who("1000"), (1000, 1000, vec![44, 105]), "a listed number has its user's groups");
        assert_eq!(who("4242"), (4242, 0, vec![]), "an unlisted number is taken as it is");
        assert_eq!(who("ada:video"), (1000, 44, vec![]), "an explicit group stands alone");
        assert_eq!(who("ada:77"), (1000, 77, vec![]));
        assert_eq!(who(":44"), (0, 44, vec![]));
        assert_eq!(who("ada:"), (1000, 1000, vec![44, 105]));
    }

    #[test]
    fn unknown_names_are_refused_with_the_name() {
        assert_eq!(resolve("eve", PASSWD, GROUP), Err(UserError::NoUser("eve".to_owned())));
        assert_eq!(resolve("ada:wheel", PASSWD, GROUP), Err(UserError::NoGroup("wheel".to_owned())));
        assert_eq!(resolve("-1", PASSWD, GROUP), Err(UserError::NoUser("-1".to_owned())));
        assert_eq!(resolve("4294967296", "", ""), Err(UserError::NoUser("4294967296".to_owned())));
    }

    #[test]
    fn home_comes_from_passwd() {
        assert_eq!(resolve("ada", PASSWD, GROUP).unwrap().home.as_deref(), Some("/home/ada"));
        assert_eq!(resolve("7", PASSWD, GROUP).unwrap().home, None);
    }

    proptest! {
        #[test]
        fn images_files_never_panic(spec in ".{0,20}", passwd in ".{0,200}", group in ".{0,200}") {
            let _ = resolve(&spec, &passwd, &group);
        }
    }
}
