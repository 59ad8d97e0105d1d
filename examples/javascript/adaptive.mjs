// What Node and the page have in common: reading an export's JSON files, and asking `adaptive.onnx` for an answer.

// Above every score: no image leaves at an exit with this threshold.
const NEVER = Infinity;

/**
 * Read what the graph needs to be told. The rule itself is in `adaptive.onnx`.
 *
 * @param {(name: string) => Promise<object>} read - Returns a JSON file of the export, by its path in the folder.
 * @returns {Promise<{labels: string[], height: number, width: number, thresholds: Float32Array}>}
 */
export async function readExport(read) {
  const manifest = await read("onnx/manifest.json");
  const [height, width, channels] = manifest.image.shape;
  if (manifest.image.dtype !== "uint8" || channels !== 3) {
    throw new Error(
      `The export takes ${manifest.image.dtype} of shape ${manifest.image.shape}; expected uint8 of shape ` +
        "height, width, 3. Export with `include_preprocessing=True`, so that the graph normalises images itself.",
    );
  }
  const config = await read("config.json");
  const exits = await read("exit_config.json");
  if (!exits.thresholds) {
    throw new Error(
      "The export has no thresholds. Find some with `hf_scan.calibrate(engine, search)`, set `engine.exit_config`, " +
        "and save the engine.",
    );
  }
  const last = manifest.states.length;
  // The deepest exit answers all that reach it, if it is also what answers the rest.
  const decides = (value, index) =>
    value !== undefined && value !== null && value < 1 && !(index === last && exits.fallback === "deepest");
  const thresholds = Float32Array.from({ length: last + 1 }, (_, index) =>
    decides(exits.thresholds[index], index) ? exits.thresholds[index] : NEVER,
  );
  const labels = Array.from({ length: manifest.num_labels }, (_, index) => config.id2label?.[index] ?? `LABEL_${index}`);
  return { labels, height, width, thresholds };
}

/**
 * Classify one image.
 *
 * @param {object} ort - `onnxruntime-node` or `onnxruntime-web`.
 * @param {object} session - Of `adaptive.onnx`.
 * @param {object} network - What `readExport` returned.
 * @param {Uint8Array} pixels - Height x width x 3 values, row by row, red first.
 * @returns {Promise<{label: string, exit: number, confidence: number, milliseconds: number}>} `exit` counts from 0;
 *     one past the last exit is the mean of all.
 */
export async function classify(ort, session, network, pixels) {
  const feeds = {
    pixel_values: new ort.Tensor("uint8", pixels, [1, network.height, network.width, 3]),
    thresholds: new ort.Tensor("float32", network.thresholds, [network.thresholds.length]),
  };
  const start = performance.now();
  const answer = await session.run(feeds);
  const milliseconds = performance.now() - start;
  const logits = answer.logits.data;
  return {
    label: network.labels[logits.indexOf(Math.max(...logits))],
    exit: Number(answer.exit_index.data[0]),
    confidence: answer.confidence.data[0],
    milliseconds,
  };
}
