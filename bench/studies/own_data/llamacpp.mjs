// What llama.cpp makes of prompts, by node-llama-cpp: {model, prompts, chats, count, forced} on stdin, an answer a
// prompt on stdout. `forced`, where there is one, are the tokens that a prompt goes on with in the place of the likeliest.
import {readFileSync} from "node:fs";
import {createRequire} from "node:module";
import {pathToFileURL} from "node:url";

const [folder] = process.argv.slice(2);
const require = createRequire(`${folder}/package.json`);
const {getLlama, JinjaTemplateChatWrapper} = await import(pathToFileURL(require.resolve("node-llama-cpp")));
const asked = JSON.parse(readFileSync(0, "utf-8"));

const llama = await getLlama({gpu: false, build: "never", logLevel: "error"});
const model = await llama.loadModel({modelPath: asked.model, gpuLayers: 0});
const context = await model.createContext({contextSize: 1024, threads: 1, flashAttention: false});
const sequence = context.getSequence();

async function next(tokens) {
    const wish = {generateNext: {token: true, probabilities: true, options: {temperature: 0}}};
    const output = await sequence.controlledEvaluate([...tokens.slice(0, -1), [tokens.at(-1), wish]]);
    const {token, probabilities} = output.at(-1).next;
    return {token, likeliest: [...probabilities.entries()].slice(0, asked.likeliest)};
}

async function written(tokens, forced) {
    await sequence.clearHistory();
    const steps = [await next(tokens)];
    while (steps.length < (forced ? forced.length : asked.count)) {
        const last = forced ? forced[steps.length - 1] : steps.at(-1).token;
        if (!forced && model.isEogToken(last)) break;
        steps.push(await next([last]));
    }
    return steps;
}

function templated(messages) {
    const {template} = {template: model.fileInfo.metadata.tokenizer.chat_template};
    const wrapper = new JinjaTemplateChatWrapper({template});
    const history = messages.map(({role, content}) =>
        role === "assistant" ? {type: "model", response: [content]} : {type: role, text: content});
    const {contextText} = wrapper.generateContextState({chatHistory: [...history, {type: "model", response: []}]});
    return contextText.tokenize(model.tokenizer);
}

const answers = [];
for (const {text, messages, forced} of asked.prompts) {
    const tokens = messages ? templated(messages) : model.tokenize(text, true);
    answers.push({tokens, steps: tokens.length ? await written(tokens, forced) : []});
}
process.stdout.write(JSON.stringify({answers, info: llama.systemInfo, release: llama.llamaCppRelease}));
await llama.dispose();
