// SPDX-License-Identifier: Apache-2.0
//! From config.json to the agent's protocol, by the protocol's own definition: what it has no
//! field for is an error, and every field that it has can be listed.

use std::path::Path;

use anyhow::{Context as _, Result, bail};
use protobuf::reflect::{
    FieldDescriptor, FileDescriptor, MessageDescriptor, ReflectValueBox, RuntimeFieldType,
    RuntimeType,
};
use protobuf::{Message as _, MessageDyn};
use protocols::agent::oci;
use serde_json::Value;

/// The messages of `oci.proto`.
pub struct Protocol(MessageDescriptor);

impl Protocol {
    pub fn read() -> Result<Self> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../protocols/protos/agent");
        let parsed = protobuf_parse::Parser::new()
            .pure()
            .include(&folder)
            .input(folder.join("oci.proto"))
            .parse_and_typecheck()?;
        let file = parsed
            .file_descriptors
            .into_iter()
            .next()
            .context("no file")?;
        let file = FileDescriptor::new_dynamic(file, &[])?;
        let spec = file
            .message_by_package_relative_name("Spec")
            .context("oci.proto has no Spec")?;
        Ok(Self(spec))
    }

    /// The specification as the agent gets it.
    pub fn spec(&self, config: &Value) -> Result<oci::Spec> {
        let message = message(&self.0, config, "")?;
        Ok(oci::Spec::parse_from_bytes(&message.write_to_bytes_dyn()?)?)
    }

    /// The path of every field that holds a value, in lower case.
    pub fn fields(&self) -> Vec<String> {
        let mut fields = Vec::new();
        list(&self.0, "", &mut fields);
        fields
    }
}

fn list(descriptor: &MessageDescriptor, prefix: &str, fields: &mut Vec<String>) {
    for field in descriptor.fields() {
        let path = format!("{prefix}{}", name(&field));
        match field.runtime_field_type() {
            RuntimeFieldType::Singular(RuntimeType::Message(inner))
            | RuntimeFieldType::Repeated(RuntimeType::Message(inner))
                // What other systems have is refused whole.
                if inner.field_by_name("dummy").is_none() =>
            {
                list(&inner, &format!("{path}."), fields);
            }
            _ => fields.push(path),
        }
    }
}

/// As config.json calls a field, in lower case.
fn name(field: &FieldDescriptor) -> String {
    match field.name() {
        "Version" => "ociversion".to_owned(),
        other => other.to_lowercase(),
    }
}

fn message(
    descriptor: &MessageDescriptor,
    value: &Value,
    path: &str,
) -> Result<Box<dyn MessageDyn>> {
    let object = value
        .as_object()
        .with_context(|| format!("{path}: no object"))?;
    let mut message = descriptor.new_instance();
    for (key, value) in object.iter().filter(|(_, value)| !value.is_null()) {
        let path = format!("{path}.{key}");
        let field = descriptor
            .fields()
            .find(|field| name(field) == key.to_lowercase())
            .with_context(|| format!("{path}: the protocol has no such field"))?;
        let broken = || format!("{path}: {value}");
        match field.runtime_field_type() {
            RuntimeFieldType::Singular(kind) => {
                field.set_singular_field(&mut *message, scalar(&kind, value, &path)?);
            }
            RuntimeFieldType::Repeated(kind) => {
                for value in value.as_array().with_context(broken)? {
                    let value = scalar(&kind, value, &path)?;
                    field.mut_repeated(&mut *message).push(value);
                }
            }
            RuntimeFieldType::Map(of, to) => {
                for (key, value) in value.as_object().with_context(broken)? {
                    let key = scalar(&of, &Value::String(key.clone()), &path)?;
                    let value = scalar(&to, value, &path)?;
                    field.mut_map(&mut *message).insert(key, value);
                }
            }
        }
    }
    Ok(message)
}

fn scalar(kind: &RuntimeType, value: &Value, path: &str) -> Result<ReflectValueBox> {
    let broken = || format!("{path}: {value}");
    Ok(match kind {
        RuntimeType::I64 => ReflectValueBox::I64(value.as_i64().with_context(broken)?),
        RuntimeType::U64 => ReflectValueBox::U64(value.as_u64().with_context(broken)?),
        RuntimeType::U32 => ReflectValueBox::U32(value.as_u64().with_context(broken)?.try_into()?),
        RuntimeType::Bool => ReflectValueBox::Bool(value.as_bool().with_context(broken)?),
        RuntimeType::String => {
            ReflectValueBox::String(value.as_str().with_context(broken)?.to_owned())
        }
        RuntimeType::Message(descriptor) => {
            ReflectValueBox::Message(message(descriptor, value, path)?)
        }
        other => bail!("{path}: kind {other:?}"),
    })
}
