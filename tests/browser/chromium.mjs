// Unpacks the Chromium of the npm package beside this environment, and prints where it lies.
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";
const place = createRequire(process.cwd() + "/").resolve("@sparticuz/chromium");
const { default: chromium } = await import(pathToFileURL(place));
console.log(await (chromium.default ?? chromium).executablePath());
