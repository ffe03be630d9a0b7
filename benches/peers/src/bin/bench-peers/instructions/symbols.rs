//! Names for addresses, for a list of where the instructions went: by the symbols of the mapped files.

use std::collections::HashMap;
use std::fs;
use std::ops::Range;

use object::{Object, ObjectSymbol, SymbolMap, SymbolMapName};
use rustc_demangle::demangle;

use super::stepper::Place;

/// A mapped file's code.
struct Mapping {
    start: u64,
    end: u64,
    /// Where address 0 of the file's symbols is.
    base: u64,
    path: String,
}

/// Instructions by function, the most first.
pub fn by_function(process: u32, places: &HashMap<Place, u64>) -> Vec<(String, u64)> {
    let maps = fs::read_to_string(format!("/proc/{process}/maps")).unwrap_or_default();
    let mappings = mappings(&maps);
    let mut files: HashMap<&str, Vec<u8>> = HashMap::new();
    for mapping in &mappings {
        files.entry(&mapping.path).or_insert_with(|| fs::read(&mapping.path).unwrap_or_default());
    }
    let symbols: HashMap<_, _> = files.iter().map(|(path, bytes)| (*path, symbols(bytes))).collect();
    let name = |address: u64| {
        let mapping = mappings.iter().find(|mapping| (mapping.start..mapping.end).contains(&address));
        mapping.map_or("elsewhere".to_owned(), |mapping| {
            let symbol = symbols[mapping.path.as_str()].before(address - mapping.base);
            symbol.map_or_else(|| mapping.path.clone(), |symbol| format!("{:#}", demangle(symbol.name())))
        })
    };
    let mut functions: HashMap<String, u64> = HashMap::new();
    for (place, count) in places {
        let name = match place {
            Place::Program(address) => name(*address),
            Place::LibraryFor(address) => format!("(C library) for {}", name(*address)),
        };
        *functions.entry(name).or_default() += count;
    }
    let mut functions: Vec<_> = functions.into_iter().collect();
    functions.sort_by(|one, other| other.1.cmp(&one.1).then_with(|| one.0.cmp(&other.0)));
    functions
}

/// Where a file's code is mapped, by the text of `/proc/PID/maps`.
pub fn code(maps: &str, path: &str) -> Option<Range<u64>> {
    mappings(maps).into_iter().find(|mapping| mapping.path == path).map(|mapping| mapping.start..mapping.end)
}

fn mappings(maps: &str) -> Vec<Mapping> {
    let mut bases: HashMap<String, u64> = HashMap::new();
    let mut found = Vec::new();
    for line in maps.lines() {
        let fields: Vec<_> = line.split_ascii_whitespace().collect();
        let [range, rights, offset, _device, _inode, path] = fields[..] else { continue };
        let number = |text| u64::from_str_radix(text, 16).ok();
        let numbers = range.split_once('-').and_then(|(start, end)| Some((number(start)?, number(end)?)));
        let (Some((start, end)), Some(offset)) = (numbers, number(offset)) else { continue };
        if !path.starts_with('/') {
            continue;
        }
        // The first mapping of a file is that of its beginning, where address 0 of its symbols is.
        let base = *bases.entry(path.to_owned()).or_insert(start - offset);
        if rights.contains('x') {
            found.push(Mapping { start, end, base, path: path.to_owned() });
        }
    }
    found
}

fn symbols(bytes: &[u8]) -> SymbolMap<SymbolMapName<'_>> {
    let Ok(file) = object::File::parse(bytes) else { return SymbolMap::new(Vec::new()) };
    let own = file.symbol_map();
    if !own.symbols().is_empty() {
        return own;
    }
    // A library of the system has the names that others link to, and no more.
    let mut exported = Vec::new();
    for symbol in file.dynamic_symbols().filter(|symbol| symbol.is_definition()) {
        if let Ok(name) = symbol.name() {
            exported.push(SymbolMapName::new(symbol.address(), symbol.size(), name));
        }
    }
    SymbolMap::new(exported)
}
