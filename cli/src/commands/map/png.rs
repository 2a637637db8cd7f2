//! The picture of memory as a PNG file: only squares. The meaning of the colours, and the memory, are in the file's
//! text.

use anyhow::{Context, Result};

use super::{COLUMNS, Picture};

/// Width and height of a cell in pixels.
const SIDE: usize = 8;

const WHITE: u8 = 0xff;

impl Picture {
    /// A complete file.
    pub(crate) fn as_png(&self) -> Result<Vec<u8>> {
        let (width, height) = (COLUMNS as usize * SIDE, self.rows.len() * SIDE);
        let names = self.legend().map(|look| {
            let [r, g, b] = look.colour.map(|part| part * 51);
            format!("#{r:02x}{g:02x}{b:02x} {}", look.name)
        });
        let about = format!("{}; {}", self.scale(), names.collect::<Vec<_>>().join(", "));

        let mut file = Vec::new();
        // At most 64 rows, one more for each part of memory, of which there are 64 at most: a thousand pixels each way.
        let mut encoder = png::Encoder::new(&mut file, width as u32, height as u32);
        encoder.set_color(png::ColorType::Rgb);
        encoder.set_depth(png::BitDepth::Eight);
        encoder
            .add_text_chunk("Description".into(), about)
            .and_then(|()| encoder.write_header())
            .and_then(|mut writer| {
                writer.write_image_data(&self.pixels())?;
                writer.finish()
            })
            .context("cannot create the picture")?;
        Ok(file)
    }

    /// Red, green and blue of each pixel, row after row.
    fn pixels(&self) -> Vec<u8> {
        let mut pixels = Vec::new();
        for row in &self.rows {
            let mut line = Vec::with_capacity(COLUMNS as usize * SIDE * 3);
            for cell in &row.cells {
                line.extend_from_slice(&cell.colour().map(|part| part * 51).repeat(SIDE));
            }
            line.resize(COLUMNS as usize * SIDE * 3, WHITE);
            for _ in 0..SIDE {
                pixels.extend_from_slice(&line);
            }
        }
        pixels
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::picture;
    use super::*;

    #[test]
    fn a_decoder_finds_the_cells_and_the_legend() {
        let file = picture().as_png().expect("it is made");
        let mut reader = png::Decoder::new(std::io::Cursor::new(file)).read_info().expect("a PNG");
        assert_eq!(reader.info().size(), (512, 24));
        let text = reader.info().uncompressed_latin1_text[0].text.clone();
        assert!(text.starts_with("20 KiB of memory") && text.contains("#33ff33 zstd"), "{text}");
        let mut pixels = vec![0; 512 * 24 * 3];
        reader.next_frame(&mut pixels).expect("all rows");
        let at = |x: usize, y: usize| &pixels[(y * 512 + x) * 3..][..3];
        assert_eq!(at(0, 0), [51; 3], "zero");
        assert_eq!(at(2 * SIDE, SIDE - 1), [51, 255, 51], "zstd, full");
        assert_eq!(at(3 * SIDE, 0), [WHITE; 3], "no memory");
        assert_ne!(at(0, SIDE), at(0, 0), "the next row");
    }
}
