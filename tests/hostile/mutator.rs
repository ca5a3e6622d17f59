//! Damage by chance, but within a file's structure: most of it is still JSON, a template, a checkpoint.

use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use serde_json::{Value, json};

pub struct Mutator {
    rng: StdRng,
    idle: bool,
}

impl Mutator {
    pub fn new(seed: u64) -> Mutator {
        Mutator { rng: StdRng::seed_from_u64(seed), idle: false }
    }

    /// Leaves everything as it is.
    pub fn idle() -> Mutator {
        Mutator { idle: true, ..Mutator::new(0) }
    }

    pub fn below(&mut self, n: usize) -> usize {
        self.rng.random_range(0..n.max(1))
    }

    /// One or two changes of a JSON text; sometimes of its bytes.
    pub fn json(&mut self, text: &str) -> Vec<u8> {
        if self.idle {
            return text.as_bytes().to_vec();
        }
        if self.below(8) == 0 {
            return self.bytes(text.as_bytes());
        }
        let mut value: Value = serde_json::from_str(text).unwrap();
        for _ in 0..=self.below(2) {
            let other = self.somewhere(&value).clone();
            let place = self.place(&mut value);
            *place = self.instead(place.clone(), other);
        }
        value.to_string().into_bytes()
    }

    /// A list of JSON objects, one a line.
    pub fn lines(&mut self, text: &str) -> Vec<u8> {
        if self.idle {
            return text.as_bytes().to_vec();
        }
        let mut lines: Vec<Vec<u8>> = text.lines().map(|line| line.as_bytes().to_vec()).collect();
        let at = self.below(lines.len());
        lines[at] = match self.below(6) {
            0 => self.bytes(&lines[at]),
            1 => Vec::new(),
            _ => self.json(std::str::from_utf8(&lines[at]).unwrap()),
        };
        lines.join(&b'\n')
    }

    /// Any part of `value`, itself included.
    fn somewhere<'a>(&mut self, value: &'a Value) -> &'a Value {
        let mut here = value;
        loop {
            let inner: Vec<&Value> = match here {
                Value::Object(map) => map.values().collect(),
                Value::Array(list) => list.iter().collect(),
                _ => return here,
            };
            match inner.choose(&mut self.rng) {
                Some(next) if self.rng.random_bool(0.85) => here = next,
                _ => return here,
            }
        }
    }

    fn place<'a>(&mut self, value: &'a mut Value) -> &'a mut Value {
        let n = match &*value {
            Value::Object(map) => map.len(),
            Value::Array(list) => list.len(),
            _ => 0,
        };
        if n == 0 || self.rng.random_bool(0.1) {
            return value;
        }
        let at = self.below(n);
        let next = match value {
            Value::Object(map) => map.values_mut().nth(at),
            Value::Array(list) => list.get_mut(at),
            _ => None,
        };
        self.place(next.unwrap())
    }

    fn instead(&mut self, value: Value, other: Value) -> Value {
        match (self.below(4), value) {
            (0, _) => other,
            (1, Value::Number(number)) => {
                let number = number.as_f64().unwrap_or(0.0);
                let changed = [number + 1.0, number - 1.0, -number, number * 2.0, number / 3.0, number * 1e9];
                let changed = changed[self.below(changed.len())];
                if changed.fract() == 0.0 && changed.abs() < 1e15 { json!(changed as i64) } else { json!(changed) }
            }
            (1, Value::String(text)) => String::from_utf8_lossy(&self.bytes(text.as_bytes())).into_owned().into(),
            (1, Value::Object(mut map)) => {
                let key = map.keys().nth(self.below(map.len())).cloned();
                key.map(|key| map.remove(&key));
                Value::Object(map)
            }
            (1, Value::Array(mut list)) => {
                match self.below(3) {
                    0 => list.truncate(list.len() / 2),
                    1 => list.push(other),
                    _ => list.reverse(),
                }
                Value::Array(list)
            }
            _ => {
                let nested = (0..200).fold(json!(1), |inner, _| json!([inner]));
                let values = [
                    json!(null),
                    json!(true),
                    json!(false),
                    json!(0),
                    json!(-1),
                    json!(1),
                    json!(2),
                    json!(1e308),
                    json!(2_147_483_648_u64),
                    json!(u64::MAX),
                    json!(i64::MIN),
                    json!(0.5),
                    json!(-1e-300),
                    json!(""),
                    json!("\u{0}"),
                    json!("\u{1b}[2J\u{202e}"),
                    json!("^ +$"),
                    json!("(?m)^"),
                    json!("(a+)+b"),
                    json!("["),
                    json!("../../etc/passwd"),
                    json!("x".repeat(5000)),
                    json!("é中\u{1f44d}"),
                    json!([]),
                    json!({}),
                    json!([[], {}]),
                    nested,
                ];
                values[self.below(values.len())].clone()
            }
        }
    }

    /// One to four bytes changed, put in or left out, a piece doubled, or the end cut off.
    pub fn bytes(&mut self, bytes: &[u8]) -> Vec<u8> {
        if self.idle {
            return bytes.to_vec();
        }
        let mut out = bytes.to_vec();
        for _ in 0..=self.below(4) {
            let at = self.below(out.len());
            match self.below(6) {
                0 if !out.is_empty() => out.truncate(at),
                1 if !out.is_empty() => out[at] ^= 1 << self.below(8),
                2 if !out.is_empty() => out[at] = [0, 0xff, b'"', b'{', b'\n', 0x80][self.below(6)],
                3 => out.insert(at, self.below(256) as u8),
                4 if !out.is_empty() => drop(out.remove(at)),
                _ => {
                    let piece = out[at..(at + 1 + self.below(20)).min(out.len())].to_vec();
                    let to = self.below(out.len());
                    out.splice(to..to, piece);
                }
            }
        }
        out
    }

    /// A checkpoint whose header, its length or some of its numbers differ.
    pub fn safetensors(&mut self, bytes: &[u8]) -> Vec<u8> {
        if self.idle {
            return bytes.to_vec();
        }
        let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let (header, numbers) = (&bytes[8..8 + length], &bytes[8 + length..]);
        match self.below(6) {
            0 => {
                let lengths = [0, 1, length as u64 - 1, length as u64 + 1, bytes.len() as u64, 1 << 40, u64::MAX];
                [&lengths[self.below(lengths.len())].to_le_bytes(), header, numbers].concat()
            }
            1 => self.bytes(bytes),
            2 => [&bytes[..8 + length], &self.bytes(numbers)].concat(),
            3 => {
                let mut numbers = numbers.to_vec();
                for _ in 0..8 {
                    let at = self.below(numbers.len() / 4) * 4;
                    let value = [f32::NAN, f32::INFINITY, 3e38, -3e38, 1e-45, 0.0][self.below(6)];
                    numbers[at..at + 4].copy_from_slice(&value.to_le_bytes());
                }
                [&bytes[..8 + length], &numbers].concat()
            }
            _ => {
                let header = self.json(std::str::from_utf8(header).unwrap());
                [&(header.len() as u64).to_le_bytes(), header.as_slice(), numbers].concat()
            }
        }
    }

    /// A text with tokens of a language put in, left out or exchanged.
    pub fn tokens(&mut self, text: &str, words: &[&str]) -> String {
        if self.idle {
            return text.to_string();
        }
        let mut pieces: Vec<String> = text.split_inclusive([' ', '}', '\n']).map(str::to_string).collect();
        for _ in 0..=self.below(2) {
            let at = self.below(pieces.len());
            match self.below(4) {
                0 if !pieces.is_empty() => drop(pieces.remove(at)),
                1 if !pieces.is_empty() => {
                    let other = self.below(pieces.len());
                    pieces.swap(at, other);
                }
                _ => pieces.insert(at, format!("{} ", words[self.below(words.len())])),
            }
        }
        pieces.concat()
    }
}
