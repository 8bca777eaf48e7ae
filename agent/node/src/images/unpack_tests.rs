//! Layers that try to leave, to fill, or to confuse; and honest ones.

use super::*;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink as os_symlink};
use tar::{Builder, Header};

struct Tar(Builder<Vec<u8>>);

impl Tar {
    fn new() -> Self {
        Self(Builder::new(Vec::new()))
    }

    /// An entry whose path is written as it is: the library's own checks would refuse hostile ones.
    fn add(mut self, kind: EntryType, path: &str, link: &str, content: &[u8], mode: u32) -> Self {
        let mut header = Header::new_gnu();
        header.as_old_mut().name[..path.len()].copy_from_slice(path.as_bytes());
        header.as_old_mut().linkname[..link.len()].copy_from_slice(link.as_bytes());
        header.set_entry_type(kind);
        header.set_size(content.len() as u64);
        header.set_mode(mode);
        header.set_mtime(1000);
        header.set_uid(0);
        header.set_gid(0);
        header.set_cksum();
        self.0.append(&header, content).unwrap();
        self
    }

    fn file(self, path: &str, content: &[u8]) -> Self {
        self.add(EntryType::Regular, path, "", content, 0o644)
    }

    fn dir(self, path: &str) -> Self {
        self.add(EntryType::Directory, path, "", b"", 0o755)
    }

    fn link(self, path: &str, target: &str) -> Self {
        self.add(EntryType::Symlink, path, target, b"", 0o777)
    }

    fn bytes(self) -> Vec<u8> {
        self.0.into_inner().unwrap()
    }
}

fn unpack(layers: &[Vec<u8>]) -> (tempfile::TempDir, Result<(), UnpackError>) {
    unpack_within(layers, Limits::default())
}

fn unpack_within(layers: &[Vec<u8>], limits: Limits) -> (tempfile::TempDir, Result<(), UnpackError>) {
    let outside = tempfile::tempdir().unwrap();
    let root = outside.path().join("root");
    fs::create_dir(&root).unwrap();
    let mut unpacker = Unpacker::new(&root, limits).unwrap();
    let result =
        layers.iter().try_for_each(|layer| unpacker.layer(&layer[..], layer.len() as u64, Compression::None));
    (outside, result)
}

#[test]
fn an_honest_layer_keeps_modes_times_and_links() {
    let layer = Tar::new()
        .dir("bin")
        .add(EntryType::Regular, "bin/su", "", b"elf", 0o4755)
        .add(EntryType::Link, "bin/su2", "bin/su", b"", 0)
        .link("sbin", "bin")
        .file("./etc/deep/file", b"x");
    let (outside, result) = unpack(&[layer.bytes()]);
    result.unwrap();
    let root = outside.path().join("root");
    let su = fs::metadata(root.join("bin/su")).unwrap();
    assert_eq!((su.permissions().mode() & 0o7777, su.mtime(), su.nlink()), (0o4755, 1000, 2));
    assert_eq!(fs::read_link(root.join("sbin")).unwrap(), Path::new("bin"));
    assert_eq!(fs::read(root.join("etc/deep/file")).unwrap(), b"x");
    assert_eq!(fs::metadata(root.join("bin")).unwrap().mtime(), 1000);
}

#[test]
fn later_layers_write_through_links_of_earlier_ones_but_stay_inside() {
    let base = Tar::new().dir("usr/lib").link("lib", "/usr/lib").link("up", "../../../..");
    let next = Tar::new().file("lib/new.so", b"so").file("up/escaped", b"in");
    let (outside, result) = unpack(&[base.bytes(), next.bytes()]);
    result.unwrap();
    let root = outside.path().join("root");
    assert_eq!(fs::read(root.join("usr/lib/new.so")).unwrap(), b"so");
    assert_eq!(fs::read(root.join("escaped")).unwrap(), b"in");
    assert!(!outside.path().join("escaped").exists());
}

#[test]
fn nothing_leaves_the_folder() {
    for hostile in [
        Tar::new().file("../evil", b"x"),
        Tar::new().file("a/../../evil", b"x"),
        Tar::new().link("l", "..").file("l/evil", b"x"),
        Tar::new().link("evil", "/evil").file("evil", b"x"),
        Tar::new().add(EntryType::Link, "h", "../secret", b"", 0),
        Tar::new().link("l", "..").add(EntryType::Link, "h", "l/secret", b"", 0),
        Tar::new().file(".wh...", b""),
        Tar::new().file("a/.wh..", b""),
        Tar::new().link("l", "..").file("l/.wh.secret", b""),
    ] {
        let bytes = hostile.bytes();
        let outside = tempfile::tempdir().unwrap();
        let root = outside.path().join("root");
        fs::create_dir(&root).unwrap();
        fs::write(outside.path().join("secret"), "s").unwrap();
        let mut unpacker = Unpacker::new(&root, Limits::default()).unwrap();
        let _ = unpacker.layer(&bytes[..], bytes.len() as u64, Compression::None);
        let mut names: Vec<_> = fs::read_dir(&outside).unwrap().map(|e| e.unwrap().file_name()).collect();
        names.sort();
        assert_eq!(names, ["root", "secret"]);
        assert_eq!(fs::read_to_string(outside.path().join("secret")).unwrap(), "s");
        assert!(!Path::new("/evil").exists());
        assert!(!root.join("h").exists(), "a hard link to the outside");
    }
}

#[test]
fn an_absolute_path_is_below_the_root() {
    let (outside, result) = unpack(&[Tar::new().file("/etc/x", b"1").bytes()]);
    result.unwrap();
    assert!(outside.path().join("root/etc/x").exists());
}

#[test]
fn whiteouts_hide_what_is_below_and_nothing_of_their_own_layer() {
    let base =
        Tar::new().file("d/old", b"1").file("d/sub/deep", b"1").file("gone", b"1").file("tree/a/b", b"1");
    let next = Tar::new()
        .file("d/new", b"2")
        .file("d/sub/kept", b"2")
        .file("d/.wh..wh..opq", b"")
        .file(".wh.gone", b"")
        .file(".wh.tree", b"")
        .file("absent/.wh.x", b"");
    let (outside, result) = unpack(&[base.bytes(), next.bytes()]);
    result.unwrap();
    let root = outside.path().join("root");
    for (path, there) in [
        ("d/old", false),
        ("d/new", true),
        ("d/sub/deep", false),
        ("d/sub/kept", true),
        ("gone", false),
        ("tree", false),
        ("d/.wh..wh..opq", false),
    ] {
        assert_eq!(root.join(path).exists(), there, "{path}");
    }
}

#[test]
fn kinds_replace_each_other_without_following_links() {
    let outside = tempfile::tempdir().unwrap();
    let base = Tar::new().dir("x/full").file("x/full/f", b"1").link("l", outside.path().to_str().unwrap());
    let next = Tar::new().file("x", b"file").dir("l");
    let (tree, result) = unpack(&[base.bytes(), next.bytes()]);
    result.unwrap();
    let root = tree.path().join("root");
    assert_eq!(fs::read(root.join("x")).unwrap(), b"file");
    assert!(fs::symlink_metadata(root.join("l")).unwrap().is_dir());
    os_symlink("/", root.join("z")).unwrap();
    assert!(outside.path().exists());
}

#[test]
fn devices_are_skipped() {
    let layer = Tar::new()
        .add(EntryType::Char, "dev/mem", "", b"", 0o666)
        .add(EntryType::Block, "dev/sda", "", b"", 0o666)
        .add(EntryType::Fifo, "pipe", "", b"", 0o666);
    let (outside, result) = unpack(&[layer.bytes()]);
    result.unwrap();
    assert!(!outside.path().join("root/dev/mem").exists() && !outside.path().join("root/pipe").exists());
}

#[test]
fn bombs_and_floods_are_refused() {
    let zeros = Tar::new().file("z", &vec![0; 40 << 20]).bytes();
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
    gzip.write_all(&zeros).unwrap();
    let bomb = gzip.finish().unwrap();
    let root = tempfile::tempdir().unwrap();
    let mut unpacker = Unpacker::new(root.path(), Limits::default()).unwrap();
    let error = unpacker.layer(&bomb[..], bomb.len() as u64, Compression::Gzip).unwrap_err();
    assert!(error.to_string().contains("expands"), "{error}");

    let mut many = Tar::new();
    for n in 0..20 {
        many = many.file(&format!("f{n}"), b"");
    }
    let (_dir, result) = unpack_within(&[many.bytes()], Limits { entries: 10, ..Limits::default() });
    assert!(result.unwrap_err().to_string().contains("10 entries"));
    let (_dir, result) =
        unpack_within(&[Tar::new().file("f", &[0; 100]).bytes()], Limits { bytes: 50, ..Limits::default() });
    assert!(result.unwrap_err().to_string().contains("50 bytes"));
    let deep = "d/".repeat(40) + "f";
    let (_dir, result) =
        unpack_within(&[Tar::new().file(&deep, b"").bytes()], Limits { depth: 9, ..Limits::default() });
    assert!(result.unwrap_err().to_string().contains("deeper"));
}

#[test]
fn zstd_layers_are_read() {
    let plain = Tar::new().file("f", b"zstd").bytes();
    let packed = zstd::encode_all(&plain[..], 3).unwrap();
    let root = tempfile::tempdir().unwrap();
    let mut unpacker = Unpacker::new(root.path(), Limits::default()).unwrap();
    unpacker.layer(&packed[..], packed.len() as u64, Compression::Zstd).unwrap();
    assert_eq!(fs::read(root.path().join("f")).unwrap(), b"zstd");
}

proptest::proptest! {
    #[test]
    fn garbage_is_an_error_or_nothing(bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..3000)) {
        let (outside, _) = unpack(&[bytes]);
        proptest::prop_assert_eq!(fs::read_dir(&outside).unwrap().count(), 1);
    }
}
