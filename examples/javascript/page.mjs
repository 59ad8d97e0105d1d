// Classify images in a page. `?model=FOLDER` names an export below this page, `model` by default, whose `adaptive.onnx`
// has been made one file with its weights; `?images=A,B` names images to start with.

import * as ort from "./node_modules/onnxruntime-web/dist/ort.wasm.min.mjs";
import { classify, readExport } from "./adaptive.mjs";

const query = new URLSearchParams(location.search);
const folder = query.get("model") ?? "model";
const status = document.getElementById("status");
const files = document.getElementById("files");

async function fetched(name) {
  const response = await fetch(`${folder}/${name}`);
  if (!response.ok) {
    throw new Error(`${folder}/${name} is not there (${response.status}). Put an export into the folder "${folder}".`);
  }
  return response;
}

/** The pixels of an image at the network's size, its middle if it is not a square: red, green and blue, row by row. */
function pixelsOf(image, { width, height }) {
  const canvas = new OffscreenCanvas(width, height);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.imageSmoothingQuality = "high";
  const scale = Math.max(width / image.width, height / image.height);
  const [w, h] = [image.width * scale, image.height * scale];
  context.drawImage(image, (width - w) / 2, (height - h) / 2, w, h);
  const rgba = context.getImageData(0, 0, width, height).data;
  return Uint8Array.from({ length: width * height * 3 }, (_, index) => rgba[4 * Math.floor(index / 3) + (index % 3)]);
}

async function load() {
  ort.env.wasm.numThreads = 1; // several need headers that let a page share memory
  const network = await readExport(async (name) => (await fetched(name)).json());
  const graph = await (await fetched("adaptive.onnx")).arrayBuffer();
  const session = await ort.InferenceSession.create(graph, { executionProviders: ["wasm"] });
  return { network, session };
}

async function show({ network, session }, name, blob) {
  const image = await createImageBitmap(blob, { colorSpaceConversion: "none" });
  const answer = await classify(ort, session, network, pixelsOf(image, network));
  const row = document.getElementById("answers").insertRow();
  const picture = row.insertCell().appendChild(document.createElement("img"));
  picture.src = URL.createObjectURL(blob);
  picture.alt = name;
  const last = network.thresholds.length;
  const cells = [
    answer.label,
    `${(100 * answer.confidence).toFixed(1)} %`,
    answer.exit === last ? "all together" : `${answer.exit}`,
    answer.milliseconds.toFixed(1),
  ];
  for (const text of cells) row.insertCell().textContent = text;
}

try {
  const loaded = await load();
  files.addEventListener("change", async () => {
    for (const file of files.files) await show(loaded, file.name, file);
  });
  files.disabled = false;
  for (const name of query.get("images")?.split(",") ?? []) await show(loaded, name, await (await fetch(name)).blob());
  status.textContent = `Ready: ${loaded.network.width} x ${loaded.network.height} pixels`;
} catch (error) {
  status.textContent = error.message;
}
