//! What the schema of a configuration type says beyond its derived form: the order of fields, and ports.

use schemars::{Schema, SchemaGenerator, json_schema};
use serde::de::value::Error as ValueError;
use serde::de::{DeserializeOwned, Deserializer, Error as _, Visitor};

/// The schema of a port: a number, or a Service port's name.
pub(super) fn port_schema(_: &mut SchemaGenerator) -> Schema {
    json_schema!({ "type": ["integer", "string"], "minimum": 1, "maximum": 65_535 })
}

/// Notes the order of a type's fields in its schema: the schema's own map is sorted by name. (schemars could keep the order
/// by changing every JSON map in the program.)
pub(super) fn field_order<T: DeserializeOwned>(schema: &mut Schema) {
    let mut names: &'static [&'static str] = &[];
    // Always an error: only the names of the fields are wanted.
    let _ = T::deserialize(FieldNames(&mut names));
    schema.insert("x-order".to_owned(), names.into());
}

/// Reads nothing, but learns from serde which fields a struct has.
struct FieldNames<'a>(&'a mut &'static [&'static str]);

impl<'de> Deserializer<'de> for FieldNames<'_> {
    type Error = ValueError;

    fn deserialize_any<V: Visitor<'de>>(self, _: V) -> Result<V::Value, ValueError> {
        Err(ValueError::custom("only the names of fields are wanted"))
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, ValueError> {
        *self.0 = fields;
        self.deserialize_any(visitor)
    }

    serde::forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option unit unit_struct
        newtype_struct seq tuple tuple_struct map enum identifier ignored_any
    }
}
