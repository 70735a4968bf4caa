// Draws the diagrams of a page in its colours, and again when these are changed.
(() => {
    const prefersDark = matchMedia("(prefers-color-scheme: dark)");
    const diagrams = [...document.querySelectorAll("pre.mermaid")];
    const sources = diagrams.map((diagram) => diagram.textContent);
    let drawn;

    const draw = () => {
        const chosen = document.body.dataset.theme;
        const theme = chosen === "dark" || (chosen !== "light" && prefersDark.matches) ? "dark" : "neutral";
        if (theme === drawn) return;
        drawn = theme;
        diagrams.forEach((diagram, i) => {
            diagram.textContent = sources[i];
            diagram.removeAttribute("data-processed");
        });
        mermaid.initialize({ startOnLoad: false, theme });
        mermaid.run({ nodes: diagrams });
    };

    new MutationObserver(draw).observe(document.body, { attributeFilter: ["data-theme"] });
    prefersDark.addEventListener("change", draw);
    addEventListener("load", draw);
})();
