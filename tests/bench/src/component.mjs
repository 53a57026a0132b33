// Makes the component in JavaScript: in the folder of hello.js and wit, where the package is installed.
import { writeFile } from "node:fs/promises";
import { componentize } from "@bytecodealliance/componentize-js";

const { component } = await componentize({
  sourcePath: "hello.js",
  witPath: "wit",
  worldName: "bench",
  disableFeatures: ["fetch-event", "http"],
});
await writeFile("javascript.wasm", component);
