//! The cache, with images made on the spot. Needs mkfs.erofs, as the agent does.

use super::*;
use lathe_api::artefact::DatasetFile;
use std::fs;

struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn blob(&self, content: &[u8]) -> Digest {
        let digest = Digest::of(content);
        fs::create_dir_all(self.0.path().join("blobs")).unwrap();
        fs::write(self.0.path().join("blobs").join(digest.hex()), content).unwrap();
        digest
    }

    fn store(&self) -> ImageStore {
        let at = |name| self.0.path().join(name);
        let source = BlobSource::Folder(at("blobs"));
        ImageStore::open(at("images"), at("datasets"), at("staging"), source).unwrap()
    }

    fn image(&self) -> Digest {
        let mut tar = tar::Builder::new(Vec::new());
        let mut header = tar::Header::new_gnu();
        header.set_size(2);
        header.set_mode(0o755);
        header.set_mtime(7);
        header.set_uid(0);
        header.set_gid(0);
        tar.append_data(&mut header, "bin/x", &b"hi"[..]).unwrap();
        let layer = tar.into_inner().unwrap();
        let digest = self.blob(&layer);
        let config = br#"{"os":"linux","architecture":"amd64","rootfs":{"type":"layers","diff_ids":[]},"config":{"Entrypoint":["/bin/x"]}}"#;
        let config = self.blob(config);
        let manifest = format!(
            r#"{{"schemaVersion":2,"config":{{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"{config}","size":1}},
            "layers":[{{"mediaType":"application/vnd.oci.image.layer.v1.tar","digest":"{digest}","size":{}}}]}}"#,
            layer.len()
        );
        self.blob(manifest.as_bytes())
    }
}

#[tokio::test]
async fn an_image_is_made_once_and_the_same_again() {
    let folder = Folder::new();
    let digest = folder.image();
    let store = folder.store();
    let (one, two) = tokio::join!(store.image(&digest), store.image(&digest));
    let one = one.unwrap();
    assert_eq!(one, two.unwrap());
    assert_eq!(one.config.entrypoint, ["/bin/x"]);
    // EROFS's magic number, at byte 1024.
    assert_eq!(fs::read(&one.path).unwrap()[1024..1028], 0xe0f5_e1e2_u32.to_le_bytes());
    assert_eq!(fs::read_dir(folder.0.path().join("staging")).unwrap().count(), 0);
    // What the coordinator is told, so that work comes to where the image is.
    let bytes = fs::metadata(&one.path).unwrap().len();
    assert_eq!(store.list(), [CachedArtefact { digest, bytes }]);
    fs::write(folder.0.path().join("images").join(format!("{}.erofs", "0".repeat(64))), "half").unwrap();
    assert_eq!(store.list().len(), 1, "a file without its record is not whole");
    let again = Folder::new();
    assert_eq!(again.store().image(&again.image()).await.unwrap().erofs, one.erofs);
}

#[tokio::test]
async fn a_rotten_cache_is_made_again() {
    let folder = Folder::new();
    let digest = folder.image();
    let made = folder.store().image(&digest).await.unwrap();
    let good = fs::read(&made.path).unwrap();
    fs::write(&made.path, vec![0; good.len()]).unwrap();
    let again = folder.store().image(&digest).await.unwrap();
    assert_eq!(fs::read(&again.path).unwrap(), good);
}

#[tokio::test]
async fn damaged_and_missing_blobs_are_named_and_leave_nothing() {
    let folder = Folder::new();
    let digest = folder.image();
    fs::write(folder.0.path().join("blobs").join(digest.hex()), "other").unwrap();
    let error = folder.store().image(&digest).await.unwrap_err().to_string();
    assert!(error.contains("damaged"), "{error}");
    let absent = Digest::of(b"absent");
    assert!(folder.store().image(&absent).await.is_err());
    assert_eq!(fs::read_dir(folder.0.path().join("images")).unwrap().count(), 0);
    assert_eq!(fs::read_dir(folder.0.path().join("staging")).unwrap().count(), 0);
}

#[tokio::test]
async fn a_dataset_cannot_leave_its_folder() {
    let folder = Folder::new();
    let digest = folder.blob(b"1,2\n");
    let dataset = |path: &str| {
        let files = vec![DatasetFile { path: path.to_owned(), digest, size_bytes: 4 }];
        Dataset { name: "d".into(), digest: Dataset::digest_of(&files), files }
    };
    let store = folder.store();
    for bad in ["../x", "/etc/x", "", "a/../../x"] {
        let error = store.dataset(&dataset(bad)).await.unwrap_err();
        assert!(matches!(error, ImageError::BadPath(_)), "{bad:?}: {error}");
    }
    store.dataset(&dataset("sub/longley.csv")).await.unwrap();
    let mut wrong = dataset("b");
    wrong.digest = Digest::of(b"?");
    assert!(matches!(store.dataset(&wrong).await, Err(ImageError::DatasetDigest { .. })));
}
