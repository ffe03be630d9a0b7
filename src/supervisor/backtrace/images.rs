//! The code that is loaded into this process: which files, where in memory, how to unwind it and what its functions are
//! called.
//!
//! Read from `/proc` and from the files, not asked of the loader: `dl_iterate_phdr` takes the loader's lock, and a thread
//! that stalls in `dlopen` holds it. Debug information in files of its own (`.debug`, debuginfod) is not looked for.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, Cursor, Read, Seek, SeekFrom};
use std::ops::Range;

use addr2line::Context;
use addr2line::gimli::{Dwarf, EndianSlice, NativeEndian};
use framehop::{ExplicitModuleSectionInfo, Module};
use object::{Object, ObjectSection, ObjectSegment, ObjectSymbol, ReadCache, SymbolKind};

use super::{Function, Location};

/// An executable mapping of a file, as a line of `/proc/self/maps` has it.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Mapping {
    pub range: Range<u64>,
    /// Where in the file it begins.
    pub offset: u64,
    /// Or `[vdso]`.
    pub path: String,
}

impl Mapping {
    fn parse(line: &str) -> Option<Self> {
        let mut fields = line.splitn(6, ' ');
        let (start, end) = fields.next()?.split_once('-')?;
        let number = |hexadecimal: &str| u64::from_str_radix(hexadecimal, 16).ok();
        let executable = fields.next()?.contains('x');
        let offset = number(fields.next()?)?;
        let path = fields.nth(2)?.trim_start();
        let of_code = executable && (path.starts_with('/') || path == VDSO);
        if !of_code {
            return None;
        }
        Some(Self { range: number(start)?..number(end)?, offset, path: path.to_owned() })
    }

    fn bytes(&self) -> u64 {
        self.range.end - self.range.start
    }
}

/// Code that the kernel maps into every process, so that clocks are read without a system call.
const VDSO: &str = "[vdso]";

pub(super) trait Source: Read + Seek {}
impl<T: Read + Seek> Source for T {}

/// A mapping's file, of which only what is asked for is read.
pub(super) struct Loaded {
    mapping: Mapping,
    bytes: ReadCache<Box<dyn Source>>,
}

impl Loaded {
    /// Of everything that is loaded now and can still be read.
    pub(super) fn all() -> io::Result<Vec<Self>> {
        let maps = fs::read_to_string("/proc/self/maps")?;
        let executable = fs::read_link("/proc/self/exe").ok();
        let loaded = |mapping: Mapping| {
            // The link leads to the file that runs, also when another has taken its name since.
            let is_executable = executable.as_ref().is_some_and(|path| path.as_os_str() == mapping.path.as_str());
            let source: Box<dyn Source> = if mapping.path == VDSO {
                Box::new(Cursor::new(memory(&mapping.range).ok()?))
            } else if is_executable {
                Box::new(File::open("/proc/self/exe").ok()?)
            } else if mapping.path.ends_with(" (deleted)") {
                return None;
            } else {
                Box::new(File::open(&mapping.path).ok()?)
            };
            Some(Self { mapping, bytes: ReadCache::new(source) })
        };
        Ok(maps.lines().filter_map(Mapping::parse).filter_map(loaded).collect())
    }
}

/// Bytes of this process's own memory, by a read that fails where a pointer would crash.
fn memory(range: &Range<u64>) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; (range.end - range.start) as usize];
    let mut file = File::open("/proc/self/mem")?;
    file.seek(SeekFrom::Start(range.start))?;
    file.read_exact(&mut bytes)?;
    Ok(bytes)
}

type Bytes<'a> = &'a ReadCache<Box<dyn Source>>;

/// A file of code, understood.
pub(super) struct Image<'a> {
    pub range: Range<u64>,
    /// Of the file, without directories.
    pub name: &'a str,
    /// To be subtracted from an address in memory for the address that the file speaks of.
    bias: u64,
    file: object::File<'a, Bytes<'a>>,
}

impl<'a> Image<'a> {
    /// `None` if it is no file of code that could be mapped so.
    pub(super) fn new(loaded: &'a Loaded) -> Option<Self> {
        let file = object::File::parse(&loaded.bytes).ok()?;
        let mapping = &loaded.mapping;
        let maps = |segment: &object::Segment<'a, '_, Bytes<'a>>| {
            let (offset, size) = segment.file_range();
            // A mapping begins at a page, a segment where it likes.
            let overlap = mapping.offset < offset + size && offset < mapping.offset + mapping.bytes();
            segment.permissions().executable() && overlap
        };
        let segment = file.segments().find(maps)?;
        let start = segment.address().wrapping_add(mapping.offset).wrapping_sub(segment.file_range().0);
        let bias = mapping.range.start.wrapping_sub(start);
        let name = mapping.path.trim_end_matches(" (deleted)").rsplit('/').next().unwrap_or(&mapping.path);
        Some(Self { range: mapping.range.clone(), name, bias, file })
    }

    /// The address as the file, and so `addr2line -e`, has it.
    pub(super) fn address_in_file(&self, address: u64) -> u64 {
        address.wrapping_sub(self.bias)
    }

    fn section(&self, name: &str) -> Option<(Range<u64>, &'a [u8])> {
        let section = self.file.section_by_name(name)?;
        let address = section.address();
        Some((address..address + section.size(), section.data().ok()?))
    }

    /// What the unwinder has to know.
    pub(super) fn module(&self) -> Module<&'a [u8]> {
        let (text_svma, text) = self.section(".text").unzip();
        let (eh_frame_svma, eh_frame) = self.section(".eh_frame").unzip();
        let (eh_frame_hdr_svma, eh_frame_hdr) = self.section(".eh_frame_hdr").unzip();
        let sections = ExplicitModuleSectionInfo {
            base_svma: 0,
            text_svma,
            text,
            got_svma: self.section(".got").map(|(range, _)| range),
            eh_frame_svma,
            eh_frame,
            eh_frame_hdr_svma,
            eh_frame_hdr,
            ..Default::default()
        };
        Module::new(self.name.to_owned(), self.range.clone(), self.bias, sections)
    }
}

/// What the addresses of an image are called.
pub(super) struct Symbols<'a> {
    /// `None` in a file that was stripped.
    debug: Option<Context<EndianSlice<'a, NativeEndian>>>,
    /// Beginnings and sizes of functions, in order.
    functions: Vec<(u64, u64, &'a str)>,
}

impl<'a> Symbols<'a> {
    pub(super) fn of<'i: 'a>(image: &'i Image<'a>) -> Self {
        let section = |id: addr2line::gimli::SectionId| {
            let data = image.section(id.name()).map_or(&[][..], |(_, data)| data);
            Ok::<_, addr2line::gimli::Error>(EndianSlice::new(data, NativeEndian))
        };
        let debug = Dwarf::load(section).and_then(Context::from_dwarf).ok();
        let mut functions: Vec<_> = image
            .file
            .symbols()
            .chain(image.file.dynamic_symbols())
            .filter(|symbol| symbol.kind() == SymbolKind::Text && !symbol.is_undefined())
            .filter_map(|symbol| Some((symbol.address(), symbol.size(), symbol.name().ok()?)))
            .collect();
        functions.sort_unstable();
        Self { debug, functions }
    }

    /// The functions at an address of the file: the innermost that was inlined there first, the one they are all in last.
    pub(super) fn at(&self, address: u64) -> Vec<Function> {
        let functions = self.debug.as_ref().map(|debug| described(debug, address)).unwrap_or_default();
        if !functions.is_empty() {
            return functions;
        }
        self.symbol(address).map(|name| Function { name, location: None }).into_iter().collect()
    }

    fn symbol(&self, address: u64) -> Option<String> {
        let after = self.functions.partition_point(|(begin, ..)| *begin <= address);
        let (begin, size, name) = *self.functions.get(after.checked_sub(1)?)?;
        // Functions written in assembly may have no size.
        let inside = address < begin + size || size == 0;
        inside.then(|| addr2line::demangle_auto(name.into(), None).into_owned())
    }
}

fn described(debug: &Context<EndianSlice<'_, NativeEndian>>, address: u64) -> Vec<Function> {
    let mut functions = Vec::new();
    let Ok(mut frames) = debug.find_frames(address).skip_all_loads() else { return functions };
    while let Ok(Some(frame)) = frames.next() {
        let Some(name) = frame.function.as_ref().and_then(|name| Some(name.demangle().ok()?.into_owned())) else {
            continue;
        };
        let location = frame.location.and_then(|at| Some(Location { file: at.file?.to_owned(), line: at.line? }));
        functions.push(Function { name, location });
    }
    functions
}

/// Symbols of the images that have been asked about: reading them is what takes time.
#[derive(Default)]
pub(super) struct SymbolsOf<'a>(HashMap<u64, Symbols<'a>>);

impl<'a> SymbolsOf<'a> {
    pub(super) fn image<'i: 'a>(&mut self, image: &'i Image<'a>) -> &Symbols<'a> {
        self.0.entry(image.range.start).or_insert_with(|| Symbols::of(image))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mappings_of_code_are_found_in_the_kernels_list() {
        let code = "7f1c2a028000-7f1c2a1bd000 r-xp 00028000 fd:01 1234   /usr/lib/x86_64-linux-gnu/libc.so.6";
        let path = "/usr/lib/x86_64-linux-gnu/libc.so.6".to_owned();
        assert_eq!(
            Mapping::parse(code),
            Some(Mapping { range: 0x7f1c_2a02_8000..0x7f1c_2a1b_d000, offset: 0x28000, path })
        );
        let deleted = "00400000-00500000 r-xp 00000000 00:2a 77 /srv/my server (deleted)";
        assert_eq!(Mapping::parse(deleted).unwrap().path, "/srv/my server (deleted)");
        let vdso = "7ffd1a9f2000-7ffd1a9f4000 r-xp 00000000 00:00 0                          [vdso]";
        assert_eq!(Mapping::parse(vdso).unwrap().path, VDSO);
        for other in [
            "7f1c2a1bd000-7f1c2a213000 r--p 001bd000 fd:01 1234 /usr/lib/libc.so.6",
            "7ffd1a95e000-7ffd1a97f000 rw-p 00000000 00:00 0 [stack]",
            "ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0 [vsyscall]",
            "7f1c2a000000-7f1c2a001000 r-xp 00000000 00:00 0 ",
            "7f1c2a000000-7f1c2a001000 r-xp",
            "nonsense",
            "",
        ] {
            assert_eq!(Mapping::parse(other), None, "{other}");
        }
    }
}
