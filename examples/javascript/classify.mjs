// Classify images in Node: node classify.mjs FOLDER IMAGE...
//
// FOLDER is an export with `include_preprocessing=True`, or its subfolder `int8`. Prints a line of JSON for each image.

import { readFile } from "node:fs/promises";
import path from "node:path";
import ort from "onnxruntime-node";
import sharp from "sharp";
import { classify, readExport } from "./adaptive.mjs";

const [folder, ...images] = process.argv.slice(2);
if (images.length === 0) {
  console.error("Usage: node classify.mjs FOLDER IMAGE...");
  process.exit(2);
}

const network = await readExport(async (name) => JSON.parse(await readFile(path.join(folder, name), "utf8")));
const session = await ort.InferenceSession.create(path.join(folder, "onnx", "adaptive.onnx"), {
  intraOpNumThreads: 1,
});
for (const image of images) {
  const pixels = await sharp(image)
    .toColourspace("srgb")
    .removeAlpha()
    .resize(network.width, network.height, { fit: "cover", kernel: "cubic" })
    .raw()
    .toBuffer();
  console.log(JSON.stringify({ image, ...(await classify(ort, session, network, new Uint8Array(pixels))) }));
}
