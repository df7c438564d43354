//! scratch
mod common;
use common::{debian, tree};

#[test]
fn image() {
    let image = debian::image();
    let start = std::time::Instant::now();
    let tree = tree::scan(&image.unpacked);
    println!("{} paths in {:?}", tree.len(), start.elapsed());
}
