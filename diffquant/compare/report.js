for (const slide of document.querySelectorAll(".slide")) {
  const range = slide.querySelector("input");
  range.addEventListener("input", () => slide.style.setProperty("--at", range.value + "%"));
}
const tabs = [...document.querySelectorAll(".tabs button")];
const panels = [...document.querySelectorAll(".candidate")];
const show = (index) => {
  tabs.forEach((tab, i) => tab.setAttribute("aria-selected", i === index));
  panels.forEach((panel, i) => { panel.hidden = i !== index; });
};
tabs.forEach((tab, i) => tab.addEventListener("click", () => show(i)));
if (tabs.length) show(Math.max(tabs.findIndex((tab) => tab.classList.contains("missed")), 0));
for (const button of document.querySelectorAll(".command button")) {
  button.addEventListener("click", async () => {
    await navigator.clipboard.writeText(button.previousElementSibling.textContent);
    button.textContent = "copied";
    setTimeout(() => { button.textContent = "copy"; }, 1200);
  });
}
const dark = matchMedia("(prefers-color-scheme: dark)");
document.querySelector(".theme").addEventListener("click", () => {
  const root = document.documentElement;
  const now = root.dataset.theme || (dark.matches ? "dark" : "light");
  root.dataset.theme = now === "dark" ? "light" : "dark";
});
