// SPDX-License-Identifier: Apache-2.0
//! The options of containerd's runtime handler, as they come with a request: the `ConfigPath` of
//! containerd's configuration, or, from containerd 2.0 on and without a path, the whole section in
//! place.

use protobuf::Message;
use protobuf::well_known_types::any::Any;
use protocols::containerd::runtime_options::Options;

use super::lookup::Named;
use crate::error::{Context, Kind, Result, ShimError};

/// The options' names on the wire: today's, and that of containerd before 1.3.
const NAMES: [&str; 2] = ["runtimeoptions.v1.Options", "cri.runtimeoptions.v1.Options"];

/// Whether these are options of ours.
pub(crate) fn is_ours(any: &Any) -> bool {
    NAMES.contains(&name(any))
}

fn name(any: &Any) -> &str {
    any.type_url.rsplit('/').next().unwrap_or_default()
}

/// The configuration that the options name, if any.
pub(super) fn named(options: Option<&Any>) -> Result<Option<Named>> {
    let Some(any) = options.filter(|any| !any.value.is_empty()) else {
        return Ok(None);
    };
    if !is_ours(any) {
        return Err(ShimError::new(
            Kind::InvalidArgument,
            format!(
                "runtime options of type {:?}: wants {}",
                name(any),
                NAMES[0]
            ),
        ));
    }
    let options = Options::parse_from_bytes(&any.value)
        .context(Kind::InvalidArgument, || "runtime options".to_owned())?;
    if !options.config_path.is_empty() {
        return Ok(Some(Named::File(options.config_path.into())));
    }
    if options.config_body.is_empty() {
        return Ok(None);
    }
    let text = String::from_utf8(options.config_body)
        .context(Kind::InvalidArgument, || "runtime options".to_owned())?;
    Ok(Some(Named::InPlace(text)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn any(name: &str, options: &Options) -> Any {
        Any {
            type_url: name.to_owned(),
            value: options.write_to_bytes().unwrap(),
            ..Any::default()
        }
    }

    #[test]
    fn a_file_or_a_text_is_named() {
        let mut options = Options::new();
        assert_eq!(named(None).unwrap(), None);
        assert_eq!(named(Some(&any(NAMES[0], &options))).unwrap(), None);
        options.config_body = b"[runtime]\n".to_vec();
        assert_eq!(
            named(Some(&any(NAMES[0], &options))).unwrap(),
            Some(Named::InPlace("[runtime]\n".to_owned()))
        );
        options.config_path = "/c.toml".to_owned();
        for name in [
            NAMES[0],
            NAMES[1],
            "types.containerd.io/runtimeoptions.v1.Options",
        ] {
            assert_eq!(
                named(Some(&any(name, &options))).unwrap(),
                Some(Named::File("/c.toml".into()))
            );
        }
    }

    #[test]
    fn options_of_another_runtime_are_refused() {
        let options = Options {
            config_path: "/c.toml".to_owned(),
            ..Options::new()
        };
        let error = named(Some(&any("containerd.runc.v1.Options", &options))).unwrap_err();
        assert_eq!(error.kind(), Kind::InvalidArgument);
        assert!(error.chain().contains("containerd.runc.v1.Options"));
    }
}
