// Formulas as HTML, one a line: {"tex": ..., "display": ...} in, {"html": ...} or {"error": ...} out.
const katex = require(process.argv[2]);

require("readline").createInterface({ input: process.stdin }).on("line", (line) => {
    const { tex, display } = JSON.parse(line);
    let answer;
    try {
        answer = { html: katex.renderToString(tex, { displayMode: display, strict: "error" }) };
    } catch (error) {
        answer = { error: error.message };
    }
    process.stdout.write(JSON.stringify(answer) + "\n");
});
